"""A text that likelihood is measured on, as one model's tokens: a file as it stands, or chats through the model's own template.

    text = read("wiki.txt", model.tokenizer, lambda: model.chat)         # Text: ids int64 [n], ends int64 [n]

Plain text is tokenized whole. Of the other formats (models/data/records.py) records with a text are joined by newlines. Chats are
rendered one after the other, each whole, by the template of the model that is judged: its control tokens are tokens as in a reply,
and what somebody's text spells is text. Without a template they are the texts of their messages.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from models.data.records import FORMATS, Record, as_messages, as_text, is_chat, read_records, template_arguments
from runtime.chat_tokens import ChatEncoder
from runtime.errors import UserError
from runtime.text import Tokenizer


@dataclass(frozen=True)
class Text:
    ids: np.ndarray          # int64 [n]
    ends: np.ndarray         # int64 [n]: UTF-8 bytes of the text up to the end of each token


def read_text(file: Path) -> str:
    """A UTF-8 text file, refused in words when it is missing, binary or empty."""
    try:
        raw = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if b"\0" in raw[:65536]:
        raise UserError(f"{file}: is a binary file; give UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 (byte {error.start}); convert it first") from None
    if not text.strip():
        raise UserError(f"{file}: is empty")
    return text


def plain(tokenizer: Tokenizer, text: str) -> Text:
    return _text(text, *tokenizer.encode_with_offsets(text))


def read(source: str | Path, tokenizer: Tokenizer, open_chat: Callable[[], ChatEncoder | None], enough: int | None = None) -> Text:
    """The tokens of a file or `hf:NAME@SPLIT`. open_chat: gives the model's template, None where it has none. enough: of chats, stop
    after so many tokens. Raises UserError for a source that cannot be used."""
    if not str(source).startswith("hf:") and FORMATS.get(Path(source).suffix.lower(), "text") == "text":
        return plain(tokenizer, read_text(source))
    records = read_records([str(source)])
    first = next(records)
    records, chat = chain([first], records), open_chat() if is_chat(first) else None
    if chat is None:
        return plain(tokenizer, "\n".join(map(as_text, records)))
    parts, count = [], 0
    for part in _chats(records, chat):
        parts.append(part)
        count += len(part.ids)
        if enough is not None and count >= enough:
            break
    starts = np.cumsum([0, *(part.ends[-1] if len(part.ends) else 0 for part in parts)])
    return Text(np.concatenate([part.ids for part in parts]), np.concatenate([part.ends + start for part, start in zip(parts, starts)]))


def _chats(records: Iterator[Record], chat: ChatEncoder) -> Iterator[Text]:
    for record in records:
        try:
            marked = chat.marked(as_messages(record), template_arguments(record))
            rendered = chat.render(marked, marked.messages, add_generation_prompt=False)
            yield _text(rendered, *chat.encode(rendered, marked.mark), marked.mark)
        except UserError as error:
            raise UserError(f"{record.place}: {str(error).removeprefix(f'{record.place}: ')}") from None


def _text(text: str, ids: np.ndarray, offsets: np.ndarray, mark: str | None = None) -> Text:
    """Of token ids and the characters (first, end) of each; a mark is no text."""
    before = np.cumsum([0, *(0 if c == mark else len(c.encode("utf-8", "surrogatepass")) for c in text)])
    return Text(ids, before[offsets[:, 1]])
