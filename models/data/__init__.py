"""From data files to records, examples and blocks of token ids."""

from .corpus import IGNORE, Blocks, Corpus, DataOptions, build_corpus

__all__ = ["IGNORE", "Blocks", "Corpus", "DataOptions", "build_corpus"]
