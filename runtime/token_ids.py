"""Token ids that a file gives for bos, eos and pad: checked in one way wherever they are read.

A config.json, a generation_config.json and a bundle's manifest may hold anything there. An id that is none is refused while
the file is read, because it fails (or is never met, so that a reply does not end) only much later.
"""

from .errors import UserError, shown


def token_id(value: object, vocab: int, what: str) -> int | None:
    """A whole number from 0 to vocab - 1, or None. Raises UserError, which begins with `what`."""
    if value is not None and not _is_id(value, vocab):
        raise UserError(f"{what} is {shown(value)}, which should be a token id, from 0 to {vocab - 1}; mend it or remove it")
    return value


def pad_id(value: object, vocab: int, what: str) -> int | None:
    """`token_id`, where -1 is none too: so the first Llamas say that they do not pad."""
    return token_id(None if type(value) is int and value == -1 else value, vocab, what)


def token_ids(value: object, vocab: int, what: str) -> tuple[int, ...]:
    """None, an id, or a list of them, as a tuple without repetitions. Raises UserError, which begins with `what`."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_id(item, vocab) for item in listed):
        raise UserError(f"{what} is {shown(value)}, which should be a token id or a list of them, from 0 to {vocab - 1}; mend it "
                        "or remove it")
    return tuple(dict.fromkeys(listed))


def _is_id(value: object, vocab: int) -> bool:
    return type(value) is int and 0 <= value < vocab
