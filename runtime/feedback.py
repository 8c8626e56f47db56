"""What people say about replies, in one SQLite file, and out of it as data to fine-tune on.

    python -m runtime.feedback stats FILE.db
    python -m runtime.feedback export FILE.db -o OUT.jsonl [--corrected-only]
    python -m models.finetune CKPT --task chat --data OUT.jsonl -o RUN

A server writes (`runtime.serve ... --feedback FILE.db`), and anybody may read meanwhile (SQLite's write-ahead log). What is
exported is chats: {"messages": [..., the reply], "tools"?}, with the correction in the reply's place where there is one.
Replies that were rated well or corrected are worth learning; one that was only rated badly is left out. A second
rating of one reply, known by its `id`, takes the first one's place.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from .cli import arg, run
from .errors import UserError, shown
from .files import new_file, parse_json
from .template import normal

RATINGS = {"up": 1.0, "down": -1.0}
LARGEST_RECORD = 1 << 20        # bytes of JSON
LARGEST_FILE = 1 << 30          # bytes of the database: then it counts as a full disk
_APPLICATION = 0x45646657       # SQLite's application_id of these files: "EdfW"
_TABLE = """CREATE TABLE IF NOT EXISTS feedback (number INTEGER PRIMARY KEY, at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    id TEXT UNIQUE, model TEXT, rating REAL NOT NULL, messages TEXT NOT NULL, reply TEXT NOT NULL,
    tools TEXT, correction TEXT, comment TEXT)"""
_FIELDS = ("id", "model", "rating", "messages", "reply", "tools", "correction", "comment")
_AS_JSON = ("messages", "reply", "tools")
EXAMPLES = """examples:
  %(prog)s stats feedback.db
  %(prog)s export feedback.db -o build/feedback.jsonl --corrected-only
"""


class NotStored(Exception):
    """The disk is full, the file as large as it may be, or held by another process: nothing was stored, and what was stays."""


class Store:
    """The feedback in one file. Safe from threads; other processes may read and write it too.

    Raises UserError where the file cannot be opened or is another program's.
    """

    def __init__(self, path: Path | str, largest: int = LARGEST_FILE, make: bool = True):
        self.path, self._lock = Path(path), threading.Lock()
        if not make and not self.path.is_file():
            raise UserError(f"{path}: there is no such file")
        try:
            self._base = sqlite3.connect(path, timeout=5, check_same_thread=False, isolation_level=None)
            whose, = self._base.execute("PRAGMA application_id").fetchone()
            tables, = self._base.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            if whose != _APPLICATION and (whose or tables or not make):
                raise UserError(f"{path}: a database of another program; name another file")
            self._base.execute(f"PRAGMA max_page_count = {largest // 4096}")
            if make:
                for line in (f"PRAGMA application_id = {_APPLICATION}", "PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", _TABLE):
                    self._base.execute(line)
        except sqlite3.Error as error:
            raise UserError(f"{path}: cannot be used to keep feedback in: {error}") from None

    def add(self, record: dict) -> int:
        """Store a record that `checked` returned; returns its number. On the disk when this returns. Raises NotStored."""
        values = [json.dumps(record[name]) if name in _AS_JSON and name in record else record.get(name) for name in _FIELDS]
        marks, again = ", ".join("?" * len(_FIELDS)), ", ".join(f"{name} = excluded.{name}" for name in _FIELDS)
        try:
            with self._lock:
                return self._base.execute(f"INSERT INTO feedback ({', '.join(_FIELDS)}) VALUES ({marks}) ON CONFLICT (id) DO UPDATE "
                                          f"SET {again}, at = CURRENT_TIMESTAMP RETURNING number", values).fetchall()[0][0]
        except sqlite3.Error as error:
            raise NotStored(f"the feedback could not be stored ({error}): make room where the server keeps it, or try again") from None

    def records(self) -> Iterator[dict]:
        """All of them in the order they came. Raises UserError for a damaged file."""
        try:
            for row in self._base.execute(f"SELECT at, {', '.join(_FIELDS)} FROM feedback ORDER BY number"):
                record = dict(zip(("at", *_FIELDS), row))
                yield record | {name: json.loads(record[name]) for name in _AS_JSON if record[name] is not None}
        except (sqlite3.Error, ValueError) as error:
            raise UserError(f"{self.path}: damaged: {error}") from None

    def close(self) -> None:
        with self._lock:
            self._base.close()


def checked(record: object) -> dict:
    """A record as it is stored: {"rating": -1.0 to 1.0, "messages", "reply": a message of the assistant's, and what there is
    of "id", "model", "tools", "correction", "comment"}. Others are left out. Raises UserError, which names the field.

    rating: "up", "down", or a number from -1 (bad) to 1 (good). reply: a text or a message. correction: what the reply
    should have been, a text. Checked here so that all that is stored can be learned from.
    """
    if not isinstance(record, dict):
        raise UserError(f"the feedback is {shown(record)}, which should be an object")
    rating = record.get("rating")
    rating = RATINGS.get(rating, rating) if isinstance(rating, str) else rating
    if not isinstance(rating, (int, float)) or isinstance(rating, bool) or not -1 <= rating <= 1:
        raise UserError(f'rating is {shown(rating)}, which should be "up", "down" or a number from -1 to 1 '
                        "(of 1 to 5 stars: (stars - 3) / 2)")
    messages, reply = record.get("messages"), record.get("reply")
    reply = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages is {shown(messages)}, which should be the conversation before the reply")
    for message in normal([*messages, reply]):
        _check_content(message)
    if reply["role"] != "assistant":
        raise UserError(f"reply.role is {shown(reply['role'])}, which should be assistant")
    kept = {"rating": float(rating), "messages": messages, "reply": reply}
    for name, kind in {"id": str, "model": str, "correction": str, "comment": str, "tools": list}.items():
        if (value := record.get(name)) not in (None, "", []):
            if not isinstance(value, kind):
                raise UserError(f"{name} is {shown(value)}, which should be a {'text' if kind is str else 'list'}")
            kept[name] = value
    try:
        text = json.dumps(kept).encode()
        parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the feedback is not what others can read: {error}") from None
    if len(text) > LARGEST_RECORD:
        raise UserError(f"the feedback has {len(text)} bytes, more than {LARGEST_RECORD}")
    return kept


def _check_content(message: dict) -> None:
    """Raises UserError for a message that models.data.records would not take: without text, unless it calls tools."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not calls and not all(isinstance(text, str) for text in texts):
        raise UserError(f"the content of a message is {shown(content)}, which should be a text or a list of texts")
    functions = [call.get("function") if isinstance(call, dict) else None for call in (calls if isinstance(calls, list) else [])]
    if calls and not (functions and all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions)):
        raise UserError(f"tool_calls is {shown(calls)}, which should be a list of calls with a function's name and arguments")


def as_chat(record: dict) -> dict:
    """A stored record as one to fine-tune on: the reply, or what it should have been, and what came before it. Earlier
    replies, of which nothing was said, have OpenAI's weight 0: they are read and not learned."""
    reply = record["reply"] if record["correction"] is None else {"role": "assistant", "content": record["correction"]}
    before = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in record["messages"]]
    return {"messages": [*before, reply]} | ({"tools": record["tools"]} if record["tools"] else {})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count the feedback a server has stored, or export it to fine-tune on."""
    action: str = arg(positional=True, choices=("export", "stats"), help="what to do")
    file: Path = arg(positional=True, help=f"database of {__package__}.serve --feedback")
    out: Path | None = arg(None, short="-o", help="JSONL file to write, for models.finetune --task chat")
    corrected_only: bool = arg(False, help="only what was corrected, without the replies that were rated well")


def feedback(options: Options) -> None:
    if options.action == "export" and options.out is None:
        raise UserError("-o is missing: name the file to write")
    counts = dict.fromkeys(("good", "corrected", "bad"), 0)
    with closing(Store(options.file, make=False)) as store:
        if options.action == "export":
            kept = _export(options, store, counts)
        else:
            for record in store.records():
                counts[_kind(record)] += 1
    said = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    print(said if options.action == "stats" else f"{options.out}: {kept} of {sum(counts.values())} records ({said})")


def _export(options: Options, store: Store, counts: dict[str, int]) -> int:
    """Write the file and count records by kind. Returns how many are in it. Raises UserError where that is none."""
    wanted = ("corrected",) if options.corrected_only else ("good", "corrected")
    with new_file(options.out) as partial:
        with open(partial, "w", encoding="utf-8") as file:
            for record in store.records():
                kind = _kind(record)
                counts[kind] += 1
                if kind in wanted:
                    file.write(json.dumps(as_chat(record), ensure_ascii=False) + "\n")
        if not (kept := sum(counts[kind] for kind in wanted)):
            raise UserError(f"{options.file}: nothing to learn from: of {sum(counts.values())} records none is {' or '.join(wanted)}")
    return kept


def _kind(record: dict) -> str:
    return "corrected" if record["correction"] is not None else "good" if record["rating"] > 0 else "bad"


def main(argv=None) -> int:
    return run(Options, feedback, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
