"""CSV and TSV files: which rows they have, and whether the first one names the columns.

    names, rows = open_table(source, lines, ",")          # names: list[str], or None; rows: (line number, cells)

With header "auto" the first row is held against the next `SAMPLE`: it names the columns where it has a field asked for or
one of `HEADER_NAMES`, or where its cells look like names (three words at most, no sentence, no number) and the columns
below are something else: numbers, a few values that come again and again and are never the name, or sentences. It is
data where a cell does not look like a name, or comes again below. What neither shows is refused, because a header taken
for data becomes a record and its word a label. What was taken is told once, on stderr.

A .csv whose first line has no comma may be separated by semicolons, tabs or bars; a .tsv has quotes only where they are
doubled inside. Rows without any text are passed over. Rows are not checked for their number of cells here.
"""

import csv
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from runtime.errors import UserError

HEADERS = ("auto", "yes", "no")
HEADER_NAMES = {"text", "sentence", "content", "label", "labels", "class", "source", "target", "question", "answer", "answers", "context",
                "summary", "prompt", "completion", "instruction", "input", "output", "response", "text1", "text2", "sentence1", "sentence2",
                "premise", "hypothesis", "question1", "question2", "score", "similarity"}
SAMPLE = 1000
_HEAD = 50                               # lines that show quotes and the separator
_NAME = re.compile(r"[^\W\d][\w :/()#-]{0,39}")
_DOUBLED = re.compile(r'(?:^|\t)"(?:[^"]|"")*""(?:[^"]|"")*"(?:\t|\r?\n?$)')
_told: set[tuple] = set()


def open_table(source: str, lines: Iterable[str], delimiter: str, header: str = "auto",
               wanted: Iterable[str | None] = ()) -> tuple[list[str] | None, Iterator[tuple[int, list[str]]]]:
    """The names of the columns, None where the file has none, and the rows below them.

    wanted: names of columns that were asked for. Raises UserError where the first row may be names or data, for two
    columns of one name, and for broken quotes.
    """
    lines = iter(lines)
    head = list(islice(lines, _HEAD))
    quoted = delimiter != "\t" or any(_DOUBLED.search(line[:4096]) for line in head)
    separator = _separator(head, delimiter)
    rows = _rows(source, chain(head, lines), separator, quoted)
    sample = list(islice(rows, SAMPLE + 1))
    if not sample:
        return None, iter(())
    line, names = sample[0][0], None
    first, *below = ([cell.strip() for cell in row] for _, row in sample)
    if _is_header(source, first, below, header, wanted):
        names = [cell or f"column {number}" for number, cell in enumerate(first, 1)]
        folded = [name.casefold() for name in names]
        if twice := [name for name in names if folded.count(name.casefold()) > 1]:
            raise UserError(f"{source}:{line}: two columns are named {twice[0]!r}: rename one")
        del sample[0]
    said = f"columns {', '.join(names)}, named by the first row" if names else \
        f"{len(first)} column{'s' * (len(first) > 1)} without names, data from the first row on"
    said += f"; separated by {separator!r}" if separator != delimiter else ""
    said += "; with quotes" if quoted and delimiter == "\t" else ""
    if (source, said) not in _told:
        _told.add((source, said))
        print(f"{source}: {said}", file=sys.stderr)
    return names, _below(source, chain(sample, rows), first if names else None)


def _below(source: str, rows, header: list[str] | None):
    for line, row in rows:
        if header is not None and [cell.strip() for cell in row] == header:
            raise UserError(f"{source}:{line}: the names of the columns again, as where files were joined: remove that row")
        yield line, row


def _rows(source: str, lines: Iterable[str], delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f"{source}:{rows.line_num}: {error}") from None


def _separator(head: list[str], usual: str) -> str:
    """The usual one; where the first line has none of it, another that cuts every row into as many cells."""
    if usual in next((line for line in head if line.strip()), ""):
        return usual
    for other in ",;\t|":
        try:
            rows = [len(row) for row in csv.reader(head, delimiter=other) if any(cell.strip() for cell in row)]
        except csv.Error:
            continue
        widths = set(rows[:-1] if len(head) == _HEAD else rows)            # the last may be cut short, within quotes
        if len(widths) == 1 and widths != {1}:
            return other
    return usual


def _is_header(source: str, first: list[str], below: list[list[str]], header: str, wanted: Iterable[str | None]) -> bool:
    if header != "auto":
        return header == "yes"
    names = [cell.casefold() for cell in first]
    if set(names) & {name.casefold() for name in wanted if name}:
        return True
    numbered = [name for name in names if name] == [str(i) for i in range(len(names) - names.count(""))]   # pandas' own
    if not numbered and not all(not cell or _looks_like_a_name(cell) for cell in first):
        return False
    if set(names) <= HEADER_NAMES:
        return True
    if below.count(first) > len(below) / 10:              # more often than files are joined
        return False
    columns = [[row[i] for row in below if len(row) == len(first) and row != first and row[i]] for i in range(len(first))]
    if any(cell in column for cell, column in zip(first, columns)):
        return False
    if numbered or set(names) & HEADER_NAMES:
        return True
    other = [_other_than_names(column) for column in columns]
    if "values" in other or all(other):
        return True
    raise UserError(f"{source}: its first row, {', '.join(first)}, may be names of columns or data: say --header yes or no, or "
                    f"give the columns names such as text and label")


def _looks_like_a_name(cell: str) -> bool:
    return bool(_NAME.fullmatch(cell)) and len(cell.split()) <= 3


def _other_than_names(column: list[str]) -> str | None:
    """What a column has that a name above it would not be: few or numeric "values", or "sentences"."""
    if len(column) >= 3 and (len(set(column)) <= len(column) / 2 or all(map(_number, column))):
        return "values"
    odd = sum(not _looks_like_a_name(cell) for cell in column)
    return "sentences" if odd and odd >= 0.8 * len(column) else None


def _number(cell: str) -> bool:
    try:
        return float(cell) is not None
    except ValueError:
        return False
