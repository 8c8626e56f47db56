"""Named entities: BIO tags as spans, spans as the text a decoder writes, and that text read again.

    spans(["B-person", "I-person", "O"], "f:1")        # [("person", 0, 2)]
    as_text(["Ann", "Lee", "slept"], [("person", 0, 2)])     # "Ann Lee = person"
"""

from collections.abc import Sequence

from runtime.errors import UserError

NONE = "none"
Span = tuple[str, int, int]                    # kind, first token, one past the last


def spans(tags: Sequence[str], place: str) -> list[Span]:
    """The entities of BIO tags, in order. Raises UserError, beginning with `place`, for tags that do not follow BIO."""
    found: list[Span] = []
    kind = None
    for number, tag in enumerate(tags):
        begin, dash, name = tag.partition("-")
        if tag != "O" and (begin not in ("B", "I") or not dash or not name):
            raise UserError(f"{place}: tag {tag!r} of token {number + 1} is none of O, B-KIND and I-KIND")
        if begin == "I" and name != kind:
            raise UserError(f"{place}: tag {tag!r} of token {number + 1} follows {tags[number - 1] if number else 'nothing'}: tags must be "
                            f"BIO, where a name begins with B-{name}")
        if begin == "B":
            found.append((name, number, number + 1))
        elif begin == "I":
            found[-1] = (name, found[-1][1], number + 1)
        kind = name or None
    return found


def as_text(tokens: Sequence[str], found: Sequence[Span]) -> str:
    return "; ".join(f"{' '.join(tokens[first:end])} = {kind}" for kind, first, end in found) or NONE


def from_text(text: str) -> list[tuple[str, str]]:
    """(kind, name) of each entity that an answer lists; what is not of that form is passed over."""
    pairs = [part.rpartition("=") for part in text.split(";")]
    return [(kind.strip(), " ".join(name.split())) for name, sign, kind in pairs if sign and name.strip() and kind.strip()]
