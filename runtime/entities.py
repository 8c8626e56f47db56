"""Entities in a text, from a label for each of its words.

Labels are BIO tags: B-TYPE begins an entity, I-TYPE continues one of that type, O is none. Where an I-TYPE has nothing to continue,
it begins an entity, as in CoNLL's scoring and seqeval's.

A word here is a run of letters and digits, or one other character: a tokenizer that cuts elsewhere has its first token in a word
speak for the word. So training (models/encoders) and the runtime agree on the words of a text, whatever the tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entity:
    """text[start:end] of a text is an entity of this label. score: the mean probability of its words' tags."""

    label: str
    start: int
    end: int
    text: str
    score: float


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first, behind the last) of the entities that these tags say, in order."""
    found, start, kind = [], 0, None
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind is not None and (mark != "I" or name != kind):
            found.append((kind, start, place))
            kind = None
        if mark in "BI" and kind is None:
            start, kind = place, name
    return found


def word_starts(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Which tokens of `text`, given by the characters they stand for, are the first of a word."""
    first, before = [], 0
    for number, (start, end) in enumerate(offsets):
        start += len(text[start:end]) - len(text[start:end].lstrip())            # some tokenizers count the space before
        if start < end and (not before or start > before or not (text[start].isalnum() and text[start - 1].isalnum())):
            first.append(number)
        before = max(before, end)
    return first


def entities(text: str, offsets: Sequence[tuple[int, int]], tags: Sequence[str], scores: Sequence[float]) -> list[Entity]:
    """Of words that begin with tokens at these offsets and end where the last token before the next one does; one tag and score a word."""
    found = []
    for kind, first, stop in spans(tags):
        start, end = offsets[first][0], offsets[stop - 1][1]
        start += len(text[start:end]) - len(text[start:end].lstrip())
        found.append(Entity(kind, start, end, text[start:end], float(sum(scores[first:stop]) / (stop - first))))
    return found
