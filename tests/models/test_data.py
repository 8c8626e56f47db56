"""Tokenized corpora: nothing lost, boundaries respected, cached by content, ordered by seed and step alone."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from models.data.corpus import IGNORE, Blocks, DataOptions, Split, batch_indices, build_corpus
from runtime.errors import UserError

EOS = 256


@pytest.fixture
def tokenizer_file(tmp_path):
    """Bytes are tokens: ids can be read as text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def corpus_of(tmp_path, tokenizer_file):
    def build(lines, split=None, **options):
        (tmp_path / "data.txt").write_text("\n".join(lines))
        options = DataOptions(data=(str(tmp_path / "data.txt"),), documents="line", cache=tmp_path / "cache", **options)
        return build_corpus(options, options.data, tokenizer_file, EOS, split)
    return build


def decoded(corpus, tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    stops = [*corpus.starts[1:], len(corpus.tokens)]
    assert all(corpus.tokens[stop - 1] == EOS for stop in stops)
    return [tokenizer.decode(corpus.tokens[start:stop - 1].tolist()) for start, stop in zip(corpus.starts, stops)]


def test_documents_come_back_whole(corpus_of, tokenizer_file):
    lines = ["alpha", "βeta and 漢字", "gamma"]
    corpus = corpus_of(lines)
    assert decoded(corpus, tokenizer_file) == lines
    assert corpus.text_bytes == sum(len(line.encode()) for line in lines)


def test_ids_above_the_number_of_tokens_are_kept(corpus_of, tokenizer_file):
    """A vocabulary with gaps: few tokens, and an id that 16 bits cannot hold."""
    data = json.loads(tokenizer_file.read_text())
    data["model"]["vocab"]["z"] = 70_000
    tokenizer_file.write_text(json.dumps(data))
    assert corpus_of(["zaz"]).tokens.tolist()[::2] == [70_000, 70_000]


def test_cache_is_reused_for_equal_content_and_never_for_other(corpus_of):
    first = corpus_of(["one", "two"])
    stamp = (first.path / "tokens.bin").stat().st_mtime_ns
    again = corpus_of(["one", "two"])
    assert again.path == first.path and (again.path / "tokens.bin").stat().st_mtime_ns == stamp
    others = [corpus_of(["one", "two!"]), corpus_of(["one", "two"], min_chars=1), corpus_of(["one", "two"], deduplicate=True)]
    assert len({first.path, *(other.path for other in others)}) == 4
    assert not list(first.path.parent.glob("*.tmp"))


def test_blocks_hold_every_label_once_and_none_across_documents(corpus_of):
    rng = np.random.default_rng(0)
    corpus = corpus_of(["".join(rng.choice(list("abcdef"), rng.integers(1, 40))) for _ in range(50)])
    not_first = sorted(set(range(len(corpus.tokens))) - set(corpus.starts.tolist()))
    for boundaries in ("eos", "block"):
        blocks = Blocks(corpus, context=7, boundaries=boundaries)
        learned = []
        for index in range(len(blocks)):
            input_ids, labels = blocks.rows(np.array([index]))
            for column in np.flatnonzero(labels[0] != IGNORE):
                place = int(blocks.first[index] + column + 1)
                learned.append(place)
                assert labels[0, column] == corpus.tokens[place] and input_ids[0, column] == corpus.tokens[place - 1]
            if boundaries == "block":        # nothing of another document is in sight
                held = np.arange(blocks.first[index], blocks.stop[index])
                assert len(set(np.searchsorted(corpus.starts, held, side="right"))) == 1
        assert sorted(learned) == not_first


def test_split_is_deterministic_disjoint_and_complete(corpus_of, tokenizer_file):
    lines = [f"document {i}" for i in range(400)]
    parts = {part: decoded(corpus_of(lines, Split(part, 0.25, seed=3)), tokenizer_file) for part in ("train", "valid")}
    assert sorted(parts["train"] + parts["valid"]) == sorted(lines)
    assert 60 < len(parts["valid"]) < 140
    more = decoded(corpus_of(["new"] + lines[::-1], Split("valid", 0.25, seed=3)), tokenizer_file)
    assert set(more) - {"new"} == set(parts["valid"])
    assert set(decoded(corpus_of(lines, Split("valid", 0.25, seed=4)), tokenizer_file)) != set(parts["valid"])


def test_order_visits_every_block_once_an_epoch_and_depends_on_the_seed():
    steps = [batch_indices(10, 4, seed=1, step=step) for step in range(5)]
    visited = np.concatenate(steps)
    assert sorted(visited[:10]) == sorted(visited[10:20]) == list(range(10))
    assert visited[:10].tolist() != visited[10:20].tolist()
    assert np.array_equal(batch_indices(10, 4, seed=1, step=2), steps[2])
    assert not np.array_equal(batch_indices(10, 4, seed=2, step=2), steps[2])


def test_what_cleaning_or_the_split_empties_is_refused(corpus_of, tmp_path):
    with pytest.raises(UserError, match="too short"):
        corpus_of(["a", "b"], min_chars=10)
    with pytest.raises(UserError, match="valid side of the split is empty"):
        corpus_of(["a", "b"], Split("valid", 1e-9, seed=0))
    assert not list((tmp_path / "cache").glob("*"))


def test_corpus_is_mapped_not_loaded(corpus_of):
    assert isinstance(corpus_of(["text"]).tokens, np.memmap)


