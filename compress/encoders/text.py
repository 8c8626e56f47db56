"""Text for an encoder that is compressed: what records have to read, as the encoder's tokens, spread evenly over the files."""

from pathlib import Path

from models.data.cleaning import STEPS
from models.data.corpus import DataOptions
from models.data.records import Record, as_text, find_sources, folded, read_records
from models.encoders.network import max_tokens, task_of
from models.encoders.rows import asked
from models.tasks.examples import read_examples
from runtime.encoder import Encoded, TextEncoder
from runtime.errors import UserError
from runtime.text import Tokenizer

_FIRST, _SECOND = ("text1", "sentence1", "premise", "question1", "a"), ("text2", "sentence2", "hypothesis", "question2", "b")
_TASKS = ("classify", "pair", "regress", "ner")


def encoded_texts(folder: Path, config, options: DataOptions, names: tuple[str, ...], count: int | None, length: int) -> list[Encoded]:
    """At most `count` texts of at most `length` tokens: the text of each record, of a table without names its first column. Two texts
    (of a table without names that has more than two columns: the first two) are read as a pair by a classifier or a regression, and
    apart by any other encoder. With --task the records are read as that task asks them. Raises UserError."""
    if not names:
        raise UserError("an encoder is compressed on text: give --data FILES")
    if unused := next((step for step in STEPS if getattr(options, step)), None):
        raise UserError(f"{folder} is an encoder; --{unused.replace('_', '-')} cleans texts for decoders: leave it out")
    if options.task not in (None, *_TASKS):
        raise UserError(f"{folder} is an encoder; --task {options.task} is for decoders: give one of {', '.join(_TASKS)}")
    if options.task:
        found = [asked(one) for one in read_examples(options.task, names, format=options.format, header=options.header, field=options.field)]
    else:
        unit = "line" if options.documents == "file" else options.documents
        found = [_read(record, options.field) for record in read_records(find_sources(names), options.format, unit, options.header, (options.field,))]
    if task_of(folder) != "text-classification":
        found = [text for one in found for text in ((one,) if isinstance(one, str) else one)]
    if count is not None and len(found) > count:
        found = [found[i * len(found) // count] for i in range(count)]
    encode = TextEncoder(Tokenizer(folder / "tokenizer.json"), min(length, max_tokens(config)))
    return [encode(text) for text in found]


def _read(record: Record, field: str | None) -> str | tuple[str, str]:
    """A record's text, or its two."""
    fields = folded(record)
    if field is None and set(fields) == {str(i) for i in range(len(fields))} and len(fields) > 1:
        return (fields["0"], fields["1"]) if len(fields) > 2 else fields["0"]
    second = next((fields[name] for name in _SECOND if isinstance(fields.get(name), str)), None) if field is None else None
    if second is None:
        return as_text(record, field)
    return next((fields[name] for name in _FIRST if isinstance(fields.get(name), str)), None) or as_text(record), second
