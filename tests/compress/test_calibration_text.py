"""Windows of calibration text: where they lie, and how several texts share them."""

import pytest
import torch

from compress.text import calibration_windows, corpus_windows, equal_shares
from models.checkpoint import open_checkpoint
from models.data.corpus import DataOptions
from runtime.errors import UserError
from runtime.text import Tokenizer


def test_windows_are_spread_and_text_too_short_is_refused():
    tokens = torch.arange(1000, dtype=torch.int32)
    windows = calibration_windows(tokens, 3, 100)
    assert windows.dtype == torch.int64 and windows[:, 0].tolist() == [0, 400, 900]
    assert len(calibration_windows(tokens, 99, 100)) == 10
    for short in (tokens[:99], tokens[:0]):
        with pytest.raises(UserError, match=f"has {len(short)} tokens, which is less than one window of 100"):
            calibration_windows(short, 4, 100)


@pytest.mark.parametrize("available, wanted, shares", [
    ([1000, 1000], 128, [64, 64]), ([1000, 10], 128, [118, 10]), ([3, 1000, 5], 12, [3, 5, 4]),
    ([2, 2], 128, [2, 2]), ([0, 50], 8, [0, 8]), ([9, 9, 9], 10, [3, 3, 4]),
])
def test_texts_give_equal_shares_as_far_as_they_reach(available, wanted, shares):
    found = equal_shares(available, wanted)
    assert sum(found) == min(wanted, sum(available)) and all(give <= have for give, have in zip(found, available))
    assert sorted(found) == sorted(shares)


def test_a_small_text_is_heard_beside_a_large_one(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint("llama")
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("x" * 400)
    large.write_text("the sea " * 4000)
    options = DataOptions(data=(str(small), str(large)), cache=tmp_path / "cache")
    windows = corpus_windows(open_checkpoint(path), options, 8, 16)
    of_small = set(Tokenizer(path / "tokenizer.json").encode("x" * 400))
    assert windows.shape == (8, 16)
    assert sum(set(row.tolist()) <= of_small for row in windows) in (3, 4)      # its last window may hold the EOS


def test_more_texts_than_windows_are_read_as_one(tiny_checkpoint, tmp_path):
    files = [tmp_path / f"{number}.txt" for number in range(5)]
    for file in files:
        file.write_text("a few words of one short file\n" * 8)
    options = DataOptions(data=tuple(map(str, files)), cache=tmp_path / "cache")
    assert corpus_windows(open_checkpoint(tiny_checkpoint("llama")), options, 3, 32).shape == (3, 32)
