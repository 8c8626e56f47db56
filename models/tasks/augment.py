"""Labelled texts changed so that the label stays: one changed copy of each example, drawn by seed.

    more = augmented("dropout", examples, seed=0)

`dropout` leaves out a tenth of the words (Wei and Zou 2019, "EDA"). `noise` swaps two neighbouring letters in a tenth of them, as
typing does. `templates` takes a text for a template: a seventh of its words are blanks, filled again from texts of the same label,
by their frequency there. Whether that helps is the data's affair: models.finetune --augment auto tries each on held-out examples.
It is for labels and scores only: of a text to be written, no copy of a changed question is known to keep the answer.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np

from models.tasks.examples import Example

KINDS = ("dropout", "noise", "templates")
_TEXTS = ("text", "text2")
_SHARE = {"dropout": 0.1, "noise": 0.1, "templates": 1 / 7}


def augmented(kind: str, examples: list[Example], seed: int) -> list[Example]:
    """A changed copy of every example in which a word was changed; of the others none."""
    rng, words = np.random.default_rng((seed, KINDS.index(kind))), defaultdict(list)
    for example in examples:
        words[example.answers[0]] += [word for name in _TEXTS for word in example.fields.get(name, "").split()]
    copies = []
    for example in examples:
        texts = {name: example.fields[name] for name in _TEXTS if name in example.fields}
        changed = {name: _changed(kind, text.split(), words[example.answers[0]], rng) for name, text in texts.items()}
        if changed != {name: " ".join(text.split()) for name, text in texts.items()}:
            copies.append(replace(example, fields=example.fields | changed))
    return copies


def _changed(kind: str, words: list[str], pool: list[str], rng: np.random.Generator) -> str:
    chosen = rng.random(len(words)) < _SHARE[kind]
    if kind == "dropout":
        kept = [word for word, out in zip(words, chosen) if not out]
        return " ".join(kept or words)
    if kind == "templates":
        return " ".join(pool[rng.integers(len(pool))] if blank else word for word, blank in zip(words, chosen))
    return " ".join(_swapped(word, rng) if hit else word for word, hit in zip(words, chosen))


def _swapped(word: str, rng: np.random.Generator) -> str:
    if len(word) < 2:
        return word
    place = int(rng.integers(len(word) - 1))
    return word[:place] + word[place + 1] + word[place] + word[place + 2:]
