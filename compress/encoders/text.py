"""Text for an encoder that is compressed: what records have to read, as the encoder's tokens, spread evenly over the files."""

from pathlib import Path

from models.data.records import find_sources, folded, read_records
from models.data.records import as_text
from models.encoders.network import max_tokens
from runtime.encoder import Encoded, TextEncoder
from runtime.errors import UserError
from runtime.text import Tokenizer

_SECOND = ("text2", "sentence2", "hypothesis", "question2", "b")


def encoded_texts(folder: Path, config, names: tuple[str, ...], count: int | None, length: int) -> list[Encoded]:
    """At most `count` texts of at most `length` tokens: the text of each record, of a table without names its first column, of a pair
    both. Raises UserError."""
    if not names:
        raise UserError("an encoder is compressed on text: give --data FILES")
    encode = TextEncoder(Tokenizer(folder / "tokenizer.json"), min(length, max_tokens(config)))
    found = []
    for record in read_records(find_sources(names), unit="line"):
        fields = folded(record)
        if set(fields) == {str(i) for i in range(len(fields))} and len(fields) > 1:
            found += [fields[str(i)] for i in range(2 if len(fields) > 2 else 1)]
        else:
            second = [fields[name] for name in _SECOND if isinstance(fields.get(name), str)]
            first = next((fields[name] for name in ("text1", "sentence1", "premise", "question1", "a") if second and name in fields), None)
            found += [first or as_text(record), *second]
    if count is not None and len(found) > count:
        found = [found[i * len(found) // count] for i in range(count)]
    return [encode(text) for text in found]
