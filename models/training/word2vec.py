"""A token table to begin with: word2vec's skip-gram with negative sampling (Mikolov et al. 2013), by gensim, on the training tokens.

Tokens that stand among the same tokens begin near each other, which a network learns from scratch otherwise. One pass over the first
MOST tokens in one thread: the same table for the same text and seed.
"""

import numpy as np
import torch
from gensim.models import Word2Vec

from models.data.corpus import Corpus

MOST, SENTENCE = 500_000, 1000        # tokens that are looked at, and how many at a time


@torch.no_grad()
def begin_with(table: torch.Tensor, corpus: Corpus, seed: int) -> None:
    """Give the rows of `table` [vocab, size] whose tokens occur what word2vec finds, centred and as wide as the table was."""
    tokens = np.asarray(corpus.tokens[:MOST], np.int64)
    sentences = [tokens[start:start + SENTENCE].tolist() for start in range(0, len(tokens), SENTENCE)]
    found = Word2Vec(sentences, vector_size=table.shape[1], window=5, min_count=1, sg=1, negative=5, epochs=1, workers=1, seed=seed % 2**32).wv
    vectors = torch.from_numpy(found.vectors - found.vectors.mean(0))
    table[torch.tensor(found.index_to_key)] = vectors * (table.std() / vectors.std())
