"""The tokenizer trainer: any text comes back, `transformers` opens the folder, bad options are refused."""

import pytest
import transformers
from tokenizers import Tokenizer

from models.tokenizer import SMALLEST_VOCABULARY, main

TEXT = "the king and the queen, the 1984 kingdom\n" * 30
HARD = "naïve 漢字 🦆\u200d🔥 \x00\x07 \r\n\t  12345 <|im_start|> end"


@pytest.fixture
def trained(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert main(["train", "--data", str(tmp_path / "a.txt"), "-o", str(tmp_path / "tok"), "--vocab-size", "300"]) == 0
    return tmp_path / "tok"


def test_any_text_comes_back_and_merges_shorten_known_text(trained):
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(HARD).ids, skip_special_tokens=False) == HARD
    assert len(tokenizer.encode(TEXT).ids) < len(TEXT) / 2
    assert len(tokenizer.encode("1984").ids) == 4
    assert tokenizer.get_vocab_size() <= 300


def test_transformers_opens_it_with_the_same_ids(trained):
    ours, theirs = Tokenizer.from_file(str(trained / "tokenizer.json")), transformers.AutoTokenizer.from_pretrained(trained)
    assert theirs(HARD)["input_ids"] == ours.encode(HARD).ids
    assert theirs.eos_token_id == 0
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == \
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


@pytest.mark.parametrize("size, content, message", [
    (SMALLEST_VOCABULARY - 1, "some text", "259"), (300, "", "holds no records"), (300, "\xff", "not UTF-8")])
def test_bad_input_writes_nothing(tmp_path, capsys, size, content, message):
    (tmp_path / "a.txt").write_bytes(content.encode("latin-1"))
    assert main(["train", "--data", str(tmp_path / "a.txt"), "-o", str(tmp_path / "tok"), "--vocab-size", str(size)]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_existing_folder_is_kept(trained, capsys):
    before = (trained / "tokenizer.json").read_bytes()
    assert main(["train", "--data", str(trained.parent / "a.txt"), "-o", str(trained)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (trained / "tokenizer.json").read_bytes() == before
