"""Tokens to text in pieces: whole characters, exactly the text of all tokens, and nothing past a stop string."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from runtime.errors import UserError
from runtime.text import Detokenizer, StopStrings, Tokenizer

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
