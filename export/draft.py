"""Add n-grams to a bundle that guess its next tokens: `python -m export.draft BUNDLE NGRAMS`.

`draft.ngram` (format: runtime/speculation/ngrams.py) has, for each context of one token up to the order of `python -m models.ngram`
less one, the likeliest token after it and its chance by Kneser-Ney. Left out are contexts whose best token has a chance below --least,
since guesses that fail cost time, and those after which a shorter context says nearly the same: half of them and more. The runtime then
guesses from it by itself (Engine(speculate="auto")), and its replies stay the same.
"""

from dataclasses import dataclass
from pathlib import Path

from runtime.bundle import open_bundle
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import read_json, sole_writer

EXAMPLES = """example:
  python -m models.ngram --tokenizer build/smollm2-135m --data notes.txt --valid more-notes.txt -o build/notes-ngram
  %(prog)s build/smollm2-135m-int4 build/notes-ngram
"""
FILE = "draft.ngram"


@dataclass(frozen=True)
class Options:
    """Add n-grams to a bundle that guess its next tokens: the same replies, sooner where the guesses are right."""
    bundle: Path = arg(positional=True, help="folder of the bundle")
    ngrams: Path = arg(positional=True, help="folder that `python -m models.ngram` made, with the bundle's tokenizer")
    least: float = arg(0.4, help="chance of a guess below which it is left out", least=0, most=1)


def main(argv=None) -> int:
    return run(Options, "add_draft", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import numpy as np

from export import bundle as bundles
from models.data.records import source_digest
from models.formats import lineage
from models.ngram import NgramModel, load_ngram
from runtime.files import LARGEST_TOKENIZER
from runtime.speculation.ngrams import NgramTable, write_ngrams

_SAME = 0.1                       # chances that differ by less say the same


@sole_writer("bundle")
def add_draft(options: Options) -> None:
    """Run the command. Raises UserError for a bundle or n-grams that cannot be read, or n-grams of another tokenizer."""
    bundle, model = open_bundle(options.bundle), load_ngram(options.ngrams)
    vocab, tokenizer = bundle.model["config"]["vocab_size"], bundle.manifest["tokenizer"]
    same = bundles.compact_tokenizer(read_json(options.ngrams / "tokenizer.json", largest=LARGEST_TOKENIZER)) == \
        bundles.compact_tokenizer(read_json(bundle.path(tokenizer), largest=LARGEST_TOKENIZER))
    if not same or model.vocab_size > vocab:
        raise UserError(f"{options.ngrams}: its n-grams are of another tokenizer than {options.bundle}'s; count them again with "
                        "--tokenizer set to the checkpoint that the bundle was exported from")
    tables = guesses(model, options.least)
    data = write_ngrams(model.vocab_size, bundle.manifest["files"][tokenizer]["sha256"], tables)
    manifest = bundles.without_file(bundle.manifest, FILE)
    stage = lineage.stage("export.draft", options, {"ngrams": source_digest(str(options.ngrams / "model.safetensors"))})
    manifest |= {"draft": FILE, "lineage": [*manifest["lineage"], stage]}
    bundles.add_file(options.bundle, manifest, FILE, data)
    print(f"{options.bundle}: {FILE} guesses after {sum(len(table[0]) for table in tables):,} contexts; {len(data) / 1e6:.1f} MB")


def guesses(model: NgramModel, least: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `write_ngrams` takes: for contexts of 1, 2, ... tokens, the likeliest token after them where its chance reaches `least`."""
    tables = []
    for length in range(1, len(model.orders)):
        order, mask = model.orders[length], np.uint64((1 << model.bits) - 1)
        ngrams = np.stack([(order.keys >> np.uint64(model.bits * place)) & mask for place in range(length, -1, -1)], 1).astype(np.int64)
        chances = model.probability(ngrams)
        ranked = np.lexsort((-chances, order.keys >> np.uint64(model.bits)))
        contexts, first = np.unique((order.keys >> np.uint64(model.bits))[ranked], return_index=True)
        best = ranked[first]
        keep = chances[best] >= least
        contexts, tokens, chances, ngrams = contexts[keep], ngrams[best[keep], -1], chances[best[keep]], ngrams[best[keep], :-1]
        if tables:
            shorter = NgramTable([(c, t, np.rint(p * 255)) for c, t, p in tables], model.vocab_size)      # by now, of all shorter ones
            said = [shorter.following(context) for context in ngrams[:, 1:].tolist()]
            new = np.array([not (found and found[0] == token and abs(found[1] - chance) < _SAME)
                            for found, token, chance in zip(said, tokens.tolist(), chances.tolist())], bool)
            contexts, tokens, chances = contexts[new], tokens[new], chances[new]
        tables.append((contexts, tokens, chances))
    return tables
