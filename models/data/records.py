"""Read data files of the field's formats as one stream of records.

    for record in read_records(find_sources(["corpus/*.jsonl", "notes/", "hf:NAME@train"])):
        text = as_text(record)          # or as_messages(record), as_labelled(record)

Formats, told by the file's ending or by `format`:

    text    .txt .text .md     {"text"}; a document is the file, each line, or each paragraph (`unit`)
    jsonl   .jsonl .ndjson     each line's object
    json    .json              a list of objects (Alpaca, chat), or SQuAD's {"data": ...}: one record a question
    tsv     .tsv               one field a column, named by the first row or "0", "1", ... (tables.py)
    csv     .csv               the same, with quotes
    conll   .conll .bio .iob   {"tokens", "tags"}: token and last column of each line; a blank line ends a sentence
    hf:NAME@SPLIT              a Hugging Face dataset (needs the `datasets` package): a hub name or a local folder

Everything streams but a .json file, which is read whole. A text file of more than `DOCUMENT_BYTES` counts as several documents,
cut before a line that starts with a visible character, where byte-level tokenizers split anyway. Files must be UTF-8.
"""

import glob
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from models.data.tables import open_table
from runtime.errors import UserError
from runtime.files import parse_json

FORMATS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
           ".tsv": "tsv", ".csv": "csv", ".conll": "conll", ".bio": "conll", ".iob": "conll"}
TEXT_NAMES = ("text", "sentence", "content")
CHAT_NAMES = {"messages", "conversations", "instruction", "prompt", "question"}
LABEL_NAMES = ("label", "labels", "class")
DOCUMENT_BYTES = 1 << 20
ODD_ROWS = 0.01                  # share of a table's rows that may be left out for their number of columns


class Record(NamedTuple):
    place: str                   # "FILE:LINE" or "FILE:record N", for messages
    fields: dict
    table: bool = False          # a row, whose columns have an order


def find_sources(names: Iterable[str | Path]) -> list[str]:
    """Files of every name: a file, a folder (searched to the bottom for known endings), a glob, or `hf:NAME@SPLIT`.

    Sorted within a folder or glob, so that the same names give the same order. Raises UserError where nothing is found.
    """
    found: list[str] = []
    for name in map(str, names):
        if Path(name).is_dir():
            files = sorted(str(p) for p in Path(name).rglob("*") if p.is_file() and p.suffix.lower() in FORMATS)
        elif Path(name).is_file() or name.startswith("hf:"):
            files = [name]
        else:
            files = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
        if not files:
            raise UserError(f"{name}: no data file there; give files, folders or globs of {' '.join(FORMATS)}")
        found.extend(files)
    if not found:
        raise UserError("no data given; name at least one file, folder or glob")
    return found


def read_records(sources: Iterable[str], format: str | None = None, unit: str = "file", header: str = "auto",
                 wanted: Iterable[str | None] = (), odd_rows: bool = False) -> Iterator[Record]:
    """Stream the records of `sources` (from `find_sources`) in order.

    unit: of plain text, "file", "line" or "paragraph" (blank lines between). header, wanted (columns that will be asked
    for): of tables (tables.py). odd_rows: leave out and tell rows of other than a table's columns, where they are rare.
    Raises UserError for a file that is empty, binary, not UTF-8, malformed, or uneven.
    """
    how = {"unit": unit, "header": header, "wanted": tuple(wanted), "odd_rows": odd_rows}
    for source in sources:
        kind = "hf" if source.startswith("hf:") else format or FORMATS.get(Path(source).suffix.lower())
        if kind not in _READERS:
            raise UserError(f"{source}: unknown format {kind or Path(source).suffix!r}; pass --format with one of "
                            f"{', '.join(name for name in _READERS if name != 'hf')}")
        record = None
        for record in _READERS[kind](source, **how):
            yield record
        if record is None:
            raise UserError(f"{source}: holds no records; remove it from the data or fill it")


def source_digest(source: str) -> str:
    """sha256 of a source's content: the file's bytes, or the records of a Hugging Face dataset."""
    if not source.startswith("hf:"):
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for record in _read_hf(source):
        digest.update(json.dumps(record.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def lot(text: str, seed: int) -> float:
    """What a text draws, from 0 to 1: the same whatever else there is."""
    digest = hashlib.blake2b(f"{seed}\n{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _lines(source: str) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, decoded strictly."""
    try:
        file = open(source, "rb")
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            if b"\0" in line:
                raise UserError(f"{source}:{number}: a NUL byte; this is a binary file, not text")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{source}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column "
                                f"{error.start + 1}); convert it, for example with iconv") from None
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _read_text(source, unit, **how):
    if unit not in ("file", "line", "paragraph"):
        raise UserError(f"a document of plain text is a file, a line or a paragraph, not {unit!r}")
    held, size, start = [], 0, 1
    for number, line in chain(_lines(source), [(0, None)]):               # None: the end
        full = unit == "file" and size >= DOCUMENT_BYTES and line and not line[0].isspace()
        if line is None or held and (unit == "line" or full or unit == "paragraph" and not line.strip()):
            text = "".join(held)
            if text.strip():
                yield Record(f"{source}:{start}", {"text": text if unit == "file" else text.strip()})
            held, size, start = [], 0, number
        held.append(line)
        size += len(line or "")


def _read_jsonl(source, **how):
    for number, line in _lines(source):
        if line.strip():
            yield _object(f"{source}:{number}", _parse_json(line, f"{source}:{number}"))


def _read_json(source, **how):
    text = "".join(line for _, line in _lines(source))
    if not text.strip():
        return
    data = _parse_json(text, source)
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        yield from _squad(source, data["data"])
        return
    for index, item in enumerate(data if isinstance(data, list) else [data]):
        yield _object(f"{source}:record {index}", item)


def _parse_json(text, place):
    try:
        return parse_json(text, strict=False)
    except ValueError as error:
        raise UserError(f"{place}: not JSON: {error}") from None


def _object(place, item):
    if not isinstance(item, dict):
        raise UserError(f"{place}: a record must be a JSON object, not {type(item).__name__}")
    return Record(place, item)


def _squad(source, articles):
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    name = question.get("id", question["question"])
                    yield Record(f"{source}:{name}", {
                        "id": name, "context": paragraph["context"], "question": question["question"],
                        "answers": [answer["text"] for answer in question.get("answers", [])]})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: not SQuAD's layout (data, paragraphs, qas): {error} is missing") from None


def _read_conll(source, **how):
    tokens, tags, start, columns = [], [], 1, None
    for number, line in chain(_lines(source), [(0, "")]):                 # a blank line ends the last sentence too
        cells = line.split()
        if not cells:
            if tokens:
                yield Record(f"{source}:{start}", {"tokens": tokens, "tags": tags})
            tokens, tags, start = [], [], number + 1
            continue
        columns = columns or len(cells)
        if len(cells) != columns or columns < 2:
            raise UserError(f"{source}:{number}: {len(cells)} columns where the file began with {columns}; "
                            "every line is a token and its tag")
        tokens.append(cells[0])
        tags.append(cells[-1])


def _read_table(source, delimiter, header, wanted, odd_rows, **how):
    names, rows = open_table(source, (line for _, line in _lines(source)), delimiter, header, wanted)
    count, odd = 0, []
    for count, (line, row) in enumerate(rows, 1):
        names = names or [str(i) for i in range(len(row))]
        if len(row) == len(names):
            yield Record(f"{source}:{line}", dict(zip(names, row)), True)
            continue
        odd.append((line, len(row)))
        if not odd_rows:
            break
    if odd and (not odd_rows or len(odd) > count * ODD_ROWS):
        line, found = odd[0]
        raise UserError(f"{source}:{line}: {found} columns where the file began with {len(names)}")
    if odd:
        print(f"{source}: left out {len(odd)} of {count} rows that do not have {len(names)} columns, the first is line {odd[0][0]}",
              file=sys.stderr)


def _read_hf(source, **how):
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: reading a Hugging Face dataset needs `pip install datasets`") from None
    name, _, split = source.removeprefix("hf:").partition("@")
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
            data = data[split or "train"] if isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source}: the dataset cannot be opened: {str(error).splitlines()[0]}") from None
    for index, item in enumerate(data):
        yield Record(f"{source}:record {index}", item)


# Each takes what a caller says of any format, and what it does not need as `how`.
_READERS = {"text": _read_text, "jsonl": _read_jsonl, "json": _read_json, "conll": _read_conll,
            "tsv": partial(_read_table, delimiter="\t"), "csv": partial(_read_table, delimiter=","), "hf": _read_hf}


def as_text(record: Record, field: str | None = None) -> str:
    """The record as one document: `field`, else its text, else its parts joined by newlines. Names count in any case."""
    fields = folded(record)
    if field is not None:
        return _named(record, field, "--field")
    if is_chat(record):
        return "\n".join(_content(message) or "" for message in as_messages(record))
    for name in TEXT_NAMES:
        if isinstance(fields.get(name), str):
            return fields[name]
    if "tokens" in fields:
        return " ".join(fields["tokens"])
    if numbered(record.fields):
        return "\t".join(record.fields.values())
    raise UserError(f"{record.place}: no text; it has {', '.join(map(str, record.fields))}: name one with --field, or call it text")


def is_chat(record: Record) -> bool:
    """Whether the record is messages, an instruction or a question with its answer, and has no text besides."""
    fields = folded(record)
    texts = any(isinstance(fields.get(name), str) for name in TEXT_NAMES) or "tokens" in fields or numbered(record.fields)
    return not texts and not fields.keys().isdisjoint(CHAT_NAMES)


def folded(record: Record) -> dict:
    """Its fields by lower-case name, and by their own where that differs."""
    return {str(name).casefold(): value for name, value in record.fields.items()} | record.fields


def numbered(fields: dict) -> bool:
    """Whether these are the columns of a table without names."""
    return set(fields) == {str(i) for i in range(len(fields))}


def _named(record: Record, name: str, option: str) -> str:
    fields = folded(record)
    value = fields.get(name, fields.get(name.casefold()))
    if not isinstance(value, str):
        raise UserError(f"{record.place}: no text under {name!r}, which {option} asks for; it has {', '.join(map(str, record.fields))}")
    return value


def as_messages(record: Record) -> list[dict]:
    """The record as chat messages [{"role", "content"}, ...] that end with the assistant's reply. What else a message
    of `messages` has (tool_calls, reasoning_content) stays in it; one that calls tools may lack the content, and a
    content may be a list of texts.

    Takes chat (`messages`), ShareGPT (`conversations`), Alpaca, prompt and completion, and SQuAD records.
    """
    fields = folded(record)
    try:
        if "messages" in fields:
            messages = [{**m, "role": m["role"]} if m.get("tool_calls") else {**m, "role": m["role"], "content": m["content"]}
                        for m in fields["messages"]]
        elif "conversations" in fields:
            roles = {"human": "user", "gpt": "assistant", "system": "system"}
            messages = [{"role": roles[m["from"]], "content": m["value"]} for m in fields["conversations"]]
        elif "instruction" in fields:
            prompt = "\n\n".join(part for part in (fields["instruction"], fields.get("input", "")) if part)
            messages = _exchange(prompt, fields["output"])
        elif "prompt" in fields:
            messages = _exchange(fields["prompt"], fields["completion"])
        elif "question" in fields and "context" in fields:
            messages = _exchange(f"{fields['context']}\n\n{fields['question']}", fields["answers"][0])
        else:
            raise KeyError("messages")
        texts = all(message.get("tool_calls") or _content(message) is not None for message in messages)
        if not messages or messages[-1]["role"] != "assistant" or not texts:
            raise UserError(f"{record.place}: messages must be texts that end with the assistant's reply")
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{record.place}: not a chat or instruction record: {error} is missing; it has "
                        f"{', '.join(map(str, record.fields))}") from None
    return messages


def template_arguments(record: Record) -> dict:
    """What a chat has for the template besides its messages: tools, documents and what chat_template_kwargs names.
    Tools may be JSON, as tables hold them. Raises UserError."""
    known = {name: record.fields[name] for name in ("tools", "documents") if record.fields.get(name)}
    if isinstance(known.get("tools"), str):
        known["tools"] = _parse_json(known["tools"], f"{record.place}: tools")
    more = record.fields.get("chat_template_kwargs") or {}
    if not isinstance(more, dict):
        raise UserError(f"{record.place}: chat_template_kwargs is {more!r:.60}, which should be an object")
    return known | more


def _content(message: dict) -> str | None:
    """The text of a message, that of its parts joined; None: it is no text."""
    content = message.get("content")
    texts = content if isinstance(content, list) else [content]
    texts = [text.get("text") if isinstance(text, dict) else text for text in texts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _exchange(prompt, reply):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def as_labelled(record: Record, field: str | None = None, label_field: str | None = None, number: bool = False) -> tuple[str, str]:
    """(text, label): the fields named, else those called so; of a table without names the first and the last column.
    number: the label may be any number.

    Raises UserError where that does not say which they are, or one is empty.
    """
    fields, names = folded(record), list(map(str, record.fields))
    text_name = field or next((name for name in TEXT_NAMES if name in fields), None)
    label_name = label_field or next((name for name in LABEL_NAMES if name in fields), None)
    if numbered(record.fields) and len(names) > 1:
        text_name, label_name = text_name or names[0], label_name or names[-1]
    if text_name is None or label_name is None:
        raise UserError(f"{record.place}: no text and label; it has {', '.join(names)}: name them with --field and --label-field")
    text, label = _named(record, text_name, "--field"), fields.get(label_name, fields.get(label_name.casefold()))
    if type(label) is float and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int | float if number else str | int) or not str(label).strip() or not text.strip():
        what = f"label is {label!r}, which should be a word or a number" if text.strip() else "text is empty"
        raise UserError(f"{record.place}: its {what}")
    return text, str(label).strip()
