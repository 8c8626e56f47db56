"""An n-gram language model with interpolated modified Kneser-Ney smoothing: `python -m models.ngram`.

    p(w | h) = (c(hw) - D[c(hw)]) / c(h·) + g(h) p(w | h without its first token)
    g(h) = (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h·)

c counts occurrences at the highest order and, below, the different tokens an n-gram was seen after (Kneser and Ney
1995; Chen and Goodman 1999, whose discounts D1, D2, D3+ are estimated per order from counts of counts). N_i(h) is the
number of tokens seen i times after h. The lowest order is mixed with a uniform 1 / vocabulary, so nothing has
probability 0. An n-gram is one 64-bit key, its tokens in equal bit fields; order x bits of a token may not exceed 64.
N-grams run across document ends, EOS between; the loss leaves out each document's first token.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.formats import lineage
from models.formats.chat import tokenizer_facts, tokenizer_file
from models.data.corpus import Corpus, DataOptions, build_corpus
from models.data.records import source_digest
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import new_folder, read_json, write

EXAMPLES = """examples:
  python -m models.ngram --tokenizer build/sotu-tokenizer --data ../shared/data/text/sotu-train.txt \\
      --valid ../shared/data/text/sotu-valid.txt --order 4 -o build/sotu-ngram
"""


@dataclass(frozen=True, kw_only=True)
class NgramOptions(DataOptions):
    """Count an n-gram model with Kneser-Ney smoothing, and report its loss on held-out text."""
    tokenizer: Path = arg(help="tokenizer folder (see models.tokenizer), or a checkpoint")
    valid: tuple[str, ...] = arg(help="files to report the loss on")
    order: int = arg(4, help="tokens of the longest n-gram", least=1)
    out: Path = arg(short="-o", help="folder to write; must not exist")


def main(argv=None) -> int:
    return run(NgramOptions, "train_ngram", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.families import NGRAM
from models.formats.safetensors_file import save_tensors

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Order:
    """One order's tables, sorted by key."""
    keys: np.ndarray             # uint64 [n]: n-grams
    discounted: np.ndarray       # float32 [n]: (c - D) / c(h·)
    contexts: np.ndarray         # uint64 [m]: their contexts
    backoff: np.ndarray          # float32 [m]: g


class NgramModel:
    """`log_probability` of tokens after their contexts; `next_token` gives the whole distribution."""

    def __init__(self, orders: list[Order], vocab_size: int):
        self.orders, self.vocab_size, self.bits = orders, vocab_size, token_bits(vocab_size)

    def probability(self, ngrams: np.ndarray) -> np.ndarray:
        """p of the last token of each row after the others: int64 [n, k], 1 <= k <= order -> float64 [n]."""
        p = np.full(len(ngrams), 1.0 / self.vocab_size)
        for k, order in enumerate(self.orders[:ngrams.shape[1]], 1):
            rows = ngrams[:, ngrams.shape[1] - k:]
            seen = _find(order.contexts, pack_keys(rows[:, :-1], self.bits), order.backoff, 1.0)
            p = _find(order.keys, pack_keys(rows, self.bits), order.discounted, 0.0) + seen * p
        return p

    def loss(self, corpus: Corpus) -> float:
        """Mean negative log-likelihood in nats of every token but the documents' first."""
        tokens, order = np.asarray(corpus.tokens, dtype=np.int64), len(self.orders)
        places = np.setdiff1d(np.arange(1, len(tokens)), corpus.starts)
        total = 0.0
        for k in range(2, order + 1):                    # the first tokens have shorter contexts
            here = places[places == k - 1] if k < order else places[places >= order - 1]
            for part in np.array_split(here, max(1, len(here) >> 16)):
                if len(part):
                    total -= np.log(self.probability(tokens[part[:, None] + np.arange(1 - k, 1)])).sum()
        return total / len(places)

    def next_token(self, context: Sequence[int]) -> np.ndarray:
        """float64 [vocab]: probabilities of the token after `context` (its last order - 1 tokens count)."""
        found, mask = np.full(self.vocab_size, 1.0 / self.vocab_size), np.uint64((1 << self.bits) - 1)
        for k, order in enumerate(self.orders[:len(context) + 1]):
            before, = pack_keys(np.asarray(context[len(context) - k:], np.int64)[None], self.bits)
            place = np.searchsorted(order.contexts, before)
            if place == len(order.contexts) or order.contexts[place] != before:
                break                                    # nor is a longer one
            found *= order.backoff[place].astype(np.float64)
            first, last = np.searchsorted(order.keys, [before << np.uint64(self.bits), (before << np.uint64(self.bits)) | mask])
            seen = order.keys[first:last + 1]
            seen = seen[seen >> np.uint64(self.bits) == before]
            found[(seen & mask).astype(np.int64)] += order.discounted[first:first + len(seen)]
        return found


def token_bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def pack_keys(ngrams: np.ndarray, bits: int) -> np.ndarray:
    """Rows of tokens [n, k] as uint64 [n]; the empty row is 0."""
    keys = np.zeros(len(ngrams), dtype=np.uint64)
    for column in range(ngrams.shape[1]):
        keys = (keys << np.uint64(bits)) | ngrams[:, column].astype(np.uint64)
    return keys


def _find(keys: np.ndarray, wanted: np.ndarray, values: np.ndarray, default: float) -> np.ndarray:
    """values[i] where keys[i] is the wanted key, else the default."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places].astype(np.float64), default)


def count_ngrams(tokens: np.ndarray, order: int, vocab_size: int) -> NgramModel:
    """The model of a stream of tokens int [n]. Raises UserError where n-grams do not fit 64 bits or there are none."""
    bits = token_bits(vocab_size)
    if order < 1 or order * bits > 64:
        raise UserError(f"--order {order}: from 1 to {64 // bits} with a vocabulary of {vocab_size}")
    if len(tokens) < order:
        raise UserError(f"the data has {len(tokens)} tokens, fewer than --order {order}; give more text")
    keys, counts = np.unique(pack_keys(np.lib.stride_tricks.sliding_window_view(tokens, order), bits), return_counts=True)
    orders = []
    for k in range(order, 0, -1):
        orders.append(_smooth(keys, counts, bits))
        mask = np.uint64((1 << bits * (k - 1)) - 1)
        keys, counts = np.unique(keys & mask, return_counts=True)   # each different token before it counts once
    return NgramModel(orders[::-1], vocab_size)


def _smooth(keys: np.ndarray, counts: np.ndarray, bits: int) -> Order:
    n1, n2, n3, n4 = (max(1, int((counts == c).sum())) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    raw = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    discounts = np.clip(raw, 0.0, [0, 1, 2, 3])                      # small corpora give estimates outside the range
    discounts[1:][discounts[1:] == 0] = 0.5                          # or unseen tokens would get nothing
    taken = discounts[np.minimum(counts, 3)]
    contexts, first = np.unique(keys >> np.uint64(bits), return_index=True)
    totals = np.add.reduceat(counts, first)
    backoff = np.add.reduceat(taken, first) / totals
    sizes = np.diff(np.append(first, len(keys)))
    discounted = (counts - taken) / np.repeat(totals, sizes)
    return Order(keys, discounted.astype(np.float32), contexts, backoff.astype(np.float32))


def train_ngram(options: NgramOptions) -> None:
    if options.out.exists():
        raise UserError(f"{options.out} already exists; choose another -o or remove it")
    file = tokenizer_file(options.tokenizer)
    eos, vocab_size = tokenizer_facts(options.tokenizer)
    train, valid = (build_corpus(options, names, file, eos) for names in (options.data, options.valid))
    model = count_ngrams(train.tokens, options.order, vocab_size)
    loss = model.loss(valid)
    inputs = {"data": train.digest, "valid": valid.digest, "tokenizer": source_digest(str(file))}
    with new_folder(options.out) as folder:
        write_ngram(folder, model, options.tokenizer, lineage.stage("ngram", options, inputs, {"valid_loss": loss}))
    bits = loss / math.log(2) * len(valid.tokens) / valid.text_bytes
    print(f"{options.out}: {', '.join(f'{len(o.keys):,}' for o in model.orders)} n-grams by order; validation loss "
          f"{loss:.4f} nats a token ({bits:.3f} bits a byte)")


def write_ngram(out: Path, model: NgramModel, tokenizer: Path, stage: dict) -> None:
    # safetensors' torch side takes uint64 as its int64 bits
    tensors = {f"{k}.{name}": torch.from_numpy(array.view(np.int64) if array.dtype == np.uint64 else array)
               for k, order in enumerate(model.orders, 1) for name, array in vars(order).items()}
    save_tensors(out / "model.safetensors", tensors)
    write(out / "config.json", json.dumps({"model_type": NGRAM, "order": len(model.orders), "vocab_size": model.vocab_size}, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, out / name)
    lineage.write(out, [*lineage.read(tokenizer), stage])


def is_ngram(path: Path | str) -> bool:
    file = Path(path) / "config.json"
    return file.is_file() and read_json(file, strict=False).get("model_type") == NGRAM


def load_ngram(path: Path | str) -> NgramModel:
    """Open a folder that `write_ngram` made. Raises UserError where it is none, or damaged."""
    path = Path(path)
    config = read_json(path / "config.json")
    if config.get("model_type") != NGRAM:
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}, where {NGRAM!r} is needed")
    try:
        arrays = {name: tensor.numpy() for name, tensor in load_file(path / "model.safetensors").items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as {NGRAM}: {error}") from None
    return NgramModel([Order(arrays[f"{k}.keys"].view(np.uint64), arrays[f"{k}.discounted"],
                             arrays[f"{k}.contexts"].view(np.uint64), arrays[f"{k}.backoff"])
                       for k in range(1, config["order"] + 1)], config["vocab_size"])
