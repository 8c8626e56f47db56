"""Tokens to text in pieces: whole characters, exactly the text of all tokens, and nothing past a stop string."""

import json
import os
import random

import numpy as np
import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from runtime.errors import UserError
from runtime.text import Detokenizer, ReplyText, StopStrings, Tokenizer

TEXTS = ["Hello, world! ", "naïve café — ", "日本語のテキスト", "语言模型", "👩‍👩‍👧 🏳️‍🌈 🤷🏽‍♀️ ", "a\u0301\u0323 ", "\x00 nul ", "\t\n  x",
         "العربية ", "\ufffd literal ", "ﬃ"]


def train(decoder: str) -> HfTokenizer:
    """A small tokenizer of one of the kinds in use, trained on TEXTS."""
    if decoder == "byte-level":
        hf = HfTokenizer(models.BPE())
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        hf.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False)
        hf.train_from_iterator(TEXTS[:2] * 20 + TEXTS, trainer)
    else:                                                   # Llama's sentencepiece: a prefix space, bytes for the rest
        pieces = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Helo,wrdtxcafuniv!", "▁H", "el", "lo", "▁x"]
        hf = HfTokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True, fuse_unk=True))
        hf.add_special_tokens(["<s>", "</s>"])
        hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        hf.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                        decoders.Strip(" ", 1, 0)])
    return hf


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(request.param).save(str(path))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train("byte-level").save(str(path))
    return Tokenizer(path)


def pieces_of(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(i) for i in ids], detokenizer.finish()


def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choices(TEXTS, k=rng.randint(1, 6)))
        ids = tokenizer.encode(text).tolist()
        pieces, tail = pieces_of(tokenizer, ids)
        assert "".join(pieces) + tail == tokenizer.decode(ids) == text
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces) and not tail


def test_a_character_appears_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("x𝄞").tolist()
    pieces, tail = pieces_of(tokenizer, ids)
    assert len(ids) >= 4 and pieces[-4:] == ["", "", "", "𝄞"] and "".join(pieces[:-4]) == "x" and not tail


def test_any_bytes_at_all_give_the_text_of_all_tokens(byte_level):
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(330) for _ in range(rng.randint(1, 40))]
        pieces, tail = pieces_of(byte_level, ids)
        assert "".join(pieces) + tail == byte_level.decode(ids)


def test_a_reply_cut_off_inside_a_character(tokenizer):
    ids = tokenizer.encode("ab𝄞").tolist()[:-1]
    pieces, tail = pieces_of(tokenizer, ids)
    assert "".join(pieces).strip() == "ab" and set(tail) == {"\ufffd"}


def test_special_tokens_are_no_text_and_break_nothing(tokenizer):
    ids = tokenizer.encode("Hello").tolist()
    assert "".join(pieces_of(tokenizer, [0, *ids, 1, *ids])[0]) == tokenizer.decode([0, *ids, 1, *ids])


def test_encoding(byte_level, tmp_path):
    hf = train("byte-level")
    for text in TEXTS:
        ids = byte_level.encode(text)
        assert ids.dtype == np.int64 and ids.tolist() == hf.encode(text).ids
    assert len(byte_level.encode("x" * 100_000)) > 10_000
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    hf.enable_truncation(4)                                  # what a file says of training is not for us
    hf.enable_padding(length=8)
    hf.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer(tmp_path / "t.json")
    assert tokenizer.encode("Hello, world!").tolist() == [0, *byte_level.encode("Hello, world!")]
    assert tokenizer.encode("Hello, world!", special_tokens=False).tolist() == byte_level.encode("Hello, world!").tolist()
    assert tokenizer.token_text(1) == "</s>" and tokenizer.token_text(10**6) is None


@pytest.mark.parametrize("text", ["\ud800", "abc\udfff", "\ud83d\ud83d"])
def test_lone_surrogates_are_refused(byte_level, text):
    with pytest.raises(UserError, match="lone surrogate"):
        byte_level.encode(text)


def test_what_is_no_text_is_refused(byte_level):
    with pytest.raises(UserError, match="not text"):
        byte_level.encode(b"abc")


def test_what_is_no_tokenizer_is_refused(tmp_path):
    for content in ("", "{}", "[1, 2", "\x00"):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(UserError, match="t.json.*is no tokenizer"):
            Tokenizer(tmp_path / "t.json")


def cut(text, stops):
    """The text before the stop string that is complete first; of those complete together, the longest."""
    for end in range(1, len(text) + 1):
        found = [len(s) for s in stops if text[:end].endswith(s)]
        if found:
            return text[:end - max(found)], True
    return text, False


def test_stop_strings_wherever_tokens_split_them():
    rng = random.Random(2)
    for _ in range(3000):
        alphabet = "ab" if rng.random() < 0.7 else "a日\n"
        stops = tuple("".join(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3)))
        text = "".join(rng.choices(alphabet + "c", k=rng.randint(0, 20)))
        bounds = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 8)))
        parts = [text[a:b] for a, b in zip([0, *bounds], [*bounds, len(text)])]
        matcher, shown, stopped = StopStrings(stops), "", False
        for part in parts:
            piece, stopped = matcher.push(part)
            shown += piece
            if stopped:
                break
            assert not any(s in shown for s in stops)
        if not stopped:
            shown += matcher.finish()
        assert (shown, stopped) == cut(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopStrings(("\n\nUser:",))
    assert matcher.push("Hello\n") == ("Hello", False)
    assert matcher.push("there\n\nUse") == ("\nthere", False)
    assert matcher.push("d.") == ("\n\nUsed.", False)


@pytest.mark.parametrize("stops", [("",), (3,), ("a", "")])
def test_stop_strings_that_are_none(stops):
    with pytest.raises(UserError, match="stop strings"):
        StopStrings(stops)


def stop_oracle(tokenizer, ids, stops):
    """Text before the first stop string in the text with special tokens spelled, those left out; and whether there is one."""
    spelled, shown = "", ""
    for i in ids:
        special = tokenizer.control_tokens.get(i)
        for c in special or tokenizer.decode([i]):
            spelled, shown = spelled + c, shown + (c if special is None else "\0")
            if found := [len(s) for s in stops if spelled.endswith(s)]:
                return shown[:len(shown) - max(found)].replace("\0", ""), True
    return shown.replace("\0", ""), False


def test_stop_strings_that_are_or_hold_special_tokens(byte_level):
    """<s> is 0 and </s> 1 here; the same characters also come as text."""
    rng = random.Random(3)
    letters = [0, 1, *(int(byte_level.encode(c, special_tokens=False)[0]) for c in "<s>/a")]
    stops = ["<s>", "</s>", "</s>a", "a<s>", "</s><s>", "s></s", "<s>a</s>", "<<s>", "aa"]
    for _ in range(3000):
        ids, chosen = rng.choices(letters, k=rng.randint(0, 12)), tuple(rng.sample(stops, rng.randint(0, 3)))
        reply, text, stopped = ReplyText(byte_level, chosen), "", False
        for i in ids:
            piece, stopped = reply.push(i)
            text += piece
            if stopped:
                break
        if not stopped:
            piece, stopped = reply.finish()
            text += piece
        assert (text, stopped) == stop_oracle(byte_level, ids, chosen)


def hostile(**changes):
    """A byte-level tokenizer.json with parts of it replaced."""
    hf = train("byte-level")
    return json.dumps(json.loads(hf.to_str()) | changes)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 27}},
    {"decoder": {"type": "Sequence", "decoders": [REPLACE] * 27}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 1000}},
    {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}] * 1000}},
    {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "s", "type_id": 0}}] * 1000 + [{"Sequence": {"id": "A", "type_id": 0}}],
                        "pair": [], "special_tokens": {"s": {"id": "s", "ids": [1] * 1000, "tokens": ["x"] * 1000}}}}])
def test_a_tokenizer_out_to_fill_memory_is_refused(tmp_path, changes):
    (tmp_path / "t.json").write_text(hostile(**changes))
    with pytest.raises(UserError, match="t.json.*(get the file again|is no tokenizer)"):
        Tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "continuin\\u0067_subword_prefix"])
def test_what_would_end_the_process_is_refused(tmp_path, key):
    """`tokenizers` panics over merges shorter than the prefix, and again while it cleans up."""
    (tmp_path / "t.json").write_text(hostile().replace('"continuing_subword_prefix": null', f'"{key}": "abc"'))
    assert "abc" in (tmp_path / "t.json").read_text()
    with pytest.raises(UserError, match="can end the process"):
        Tokenizer(tmp_path / "t.json")


def test_a_token_that_looks_like_a_letter_in_numbers(tmp_path):
    count = len(json.loads(hostile())["model"]["vocab"])
    token = {"id": count, "content": r"\u0041", "special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    (tmp_path / "t.json").write_text(hostile(added_tokens=[token]))
    assert Tokenizer(tmp_path / "t.json").encode(r"\u0041").tolist() == [count]


def test_a_fifo_is_no_tokenizer(tmp_path):
    os.mkfifo(tmp_path / "t.json")
    with pytest.raises(UserError, match="t.json: cannot be read .it is not a file"):
        Tokenizer(tmp_path / "t.json")


def test_a_file_larger_than_any_tokenizer_is_refused_unread(tmp_path):
    for text in (" " * (65 << 20), "[" + "1," * 9_000_000):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(UserError, match="67108864 is the limit|more than any tokenizer has"):
            Tokenizer(tmp_path / "t.json")


def test_a_panic_over_a_catastrophic_pattern_is_a_sentence(tmp_path):
    pattern = {"type": "Split", "pattern": {"Regex": "(?:a|aa)+[bc]"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "t.json").write_text(hostile(pre_tokenizer=pattern))
    tokenizer = Tokenizer(tmp_path / "t.json")
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="t.json: fails on"):
            encode("a" * 60)
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
