"""Text to token ids and back, as pieces that can be shown while they are made.

`Tokenizer` is the one way to open a `tokenizer.json`, through the `tokenizers` library: what the file says of
truncation and padding is for training batches and is switched off, and a file that is out to fill memory is refused. A
control token that a text spells (`<|im_end|>`) is text, so that nobody forges the end of a turn by writing it.

`Detokenizer` turns one token after another into text that never ends in half a character, and whose pieces join to
exactly `decode` of all the tokens. It decodes a window of the last tokens, once without and once with the new ones, and
emits what has been added. The tokens already shown stay as context, because some decoders treat the first token of a
text differently (a leading space). A window that ends in U+FFFD may end in half a character and waits. With
sentencepiece's byte fallback alone, a reply cut off inside a character keeps the complete ones before it, which
`decode` of all tokens would lose.
"""

import contextlib
import functools
import json
import os
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers

from .errors import UserError
from .files import LARGEST_TOKENIZER, read_bytes

_REPLACEMENT = "\ufffd"           # what decoders write for bytes that are no character (yet)
_MOST_COMMAS = 8_000_000          # in a tokenizer.json; every value costs memory while it is read. The largest in use have 2 million
_MOST_PARTS = 256                 # normalizers, splitters, processors and decoders
_SPELLED_OUT = re.compile(rb"\\u00(?:[46][0-9a-fA-F]|[57][0-9aA]|5[fF])")      # letters, which could hide a key
_LONG = 1 << 15                   # characters, about 10 ms: from there on as a batch of one, which alone lets Python's threads go on
_MOST_GROWTH = 32                 # times as long as its input a text may become by replacements
_MOST_ADDED = 256                 # special tokens put around a text


class _Entrance:
    """What to hold while in the library, a thread its own lock: `with _library.held():`. Any number of threads go in at once, so that a
    long text of one does not hold up the tokens of others. A fork waits until they have left, because the child would wait for ever for
    what another thread held.

    The locks are the interpreter's own, not classes of Python's: there the exception of a signal (Ctrl-C) can come between the taking of
    a lock and the `with` that gives it back."""

    def __init__(self):
        self._open_in_child()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._shut, after_in_parent=self._open, after_in_child=self._open_in_child)

    def held(self) -> threading.RLock:
        """This thread's lock."""
        if (own := getattr(self._own, "lock", None)) is None:
            with self._news:
                own = threading.RLock()
                self._locks.add(own)
            self._own.lock = own
        return own

    def _shut(self) -> None:
        self._news.acquire()                      # until _open
        self._shut_out = list(self._locks)
        for lock in self._shut_out:
            lock.acquire()

    def _open(self) -> None:
        for lock in self._shut_out:
            lock.release()
        self._shut_out = []
        self._news.release()

    def _open_in_child(self) -> None:
        self._own, self._news, self._shut_out = threading.local(), threading.Lock(), []
        self._locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()      # of the threads that there are


_library = _Entrance()


class Tokenizer:
    """Text <-> token ids, from several threads at once. Raises UserError where the file is no tokenizer, or hostile."""

    def __init__(self, path: Path | str):
        self._path = Path(path)
        try:
            data = read_bytes(self._path, LARGEST_TOKENIZER)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        if data.count(b",") > _MOST_COMMAS:
            raise UserError(f"{path}: {data.count(b',')} values are more than any tokenizer has; get the file again")
        spelled_out = _SPELLED_OUT.search(data) and _SPELLED_OUT.search(data.replace(rb"\\", b""))    # no token that has \\u0041 in it
        if b'"merges"' in data and re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', data) or spelled_out:
            raise UserError(f"{path}: BPE with a prefix for continuing pieces, or letters written as numbers: `tokenizers` can end "
                            "the process over it; get the file again")
        with self._words("is no tokenizer that `tokenizers` {version} reads ({error})"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            del data
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = True             # as text, that is
        self._encoding = threading.RLock()        # of whom that setting is
        self._check_growth()

    def encode(self, text: str, *, special_tokens: bool = True, control_tokens: bool = False) -> np.ndarray:
        """int64 ids of `text`; `special_tokens` adds those the tokenizer puts around a text (BOS), where it has any.
        control_tokens: control tokens spelled out in the text are taken for them, not for text. Raises UserError for lone
        surrogates and for text that the tokenizer fails on."""
        encoding = self._encode(text, special_tokens, control_tokens)
        ids, around = np.array(encoding.ids, np.int64), np.array(encoding.special_tokens_mask, bool)
        if control_tokens or not self._cuts(text, ids[~around]):
            return ids
        first = int(around.argmin())
        return np.concatenate((ids[:first], self._as_text(text)[0], ids[first + (~around).sum():]))

    def encode_with_offsets(self, text: str, *, control_tokens: bool = False, after: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """int64 ids [n] of `text`, with nothing around it, and the characters (first, end) that each stands for, int64 [n, 2].
        after: other text stands before it, so sentencepiece puts no space there."""
        if control_tokens:
            encoding = self._encode(text, False, True)
            ids, offsets = encoding.ids, encoding.offsets
        else:
            ids, offsets = self._as_text(text, after)
        return np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2)

    def around(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 ids that the tokenizer puts before and behind a text."""
        return self._between("a")[:2]

    def around_pair(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """int64 ids that it puts before, between and behind a pair of texts, and the type of the second's tokens."""
        return self._between("a", "a")

    def _between(self, *texts: str):
        with self._words("fails on a text ({error})"), _library.held(), self._encoding:
            found = self._tokenizer.encode(*texts)
        ids, around = np.array(found.ids, np.int64), np.array(found.special_tokens_mask, bool)
        own = np.flatnonzero(~around)
        if not len(own):
            raise UserError(f"{self._path}: has no token for a letter, so it is no tokenizer of use; get the file again")
        before, behind = ids[:own[0]], ids[own[-1] + 1:]
        if len(texts) == 1:
            return before, behind
        middle = ids[own[0]:own[-1] + 1][around[own[0]:own[-1] + 1]]
        return before, middle, behind, found.type_ids[int(own[-1])]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of many texts, with nothing around them, on all CPUs."""
        with self._words("fails on a text ({error})"), _library.held(), self._encoding:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        found = [np.array(encoding.ids, np.int64) for encoding in encodings]
        return [np.array(self._as_text(text)[0], np.int64) if self._cuts(text, ids) else ids for text, ids in zip(texts, found)]

    def decode(self, ids, *, control_tokens: bool = False) -> str:
        """Text of token ids; special tokens are left out, unless control_tokens."""
        with self._words("fails on tokens ({error})"), _library.held():
            return self._tokenizer.decode(ids, skip_special_tokens=not control_tokens)

    def token_text(self, token: int) -> str | None:
        """A token as the vocabulary spells it, special tokens included; None: no such token."""
        return self._tokenizer.id_to_token(token)

    def alone(self, token: int) -> str:
        """A token's own text: with the space it begins with, part of a character as U+FFFD, a control token as it is spelled."""
        spelling = self.token_text(token) or ""
        if token in self.control_tokens:
            return spelling
        text = self.decode([token])
        return f" {text}" if spelling.startswith("\u2581") and not text.startswith(" ") else text      # which decoding alone strips

    def token_id(self, text: str) -> int | None:
        """The id of the token that is spelled so; None: no such token."""
        return self._tokenizer.token_to_id(text)

    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones included, with its id."""
        return self._tokenizer.get_vocab()

    def json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return self._tokenizer.to_str()

    def __len__(self) -> int:
        """One more than the largest id: more than there are tokens where the ids have gaps."""
        return max(self.vocabulary().values(), default=-1) + 1

    @functools.cached_property
    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Tokens that are found in a text before it is split; the `special` ones among them are control tokens."""
        return {i: token for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.content}

    @functools.cached_property
    def control_tokens(self) -> dict[int, str]:
        """Id -> spelling of the control tokens."""
        return {i: token.content for i, token in self.added_tokens.items() if token.special}

    def _encode(self, text: str, special_tokens: bool, control_tokens: bool) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise UserError(f"the prompt is {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
                            f"{error.start}, which is half a character; remove it") from None
        with self._words("fails on this text ({error})"), _library.held(), self._encoding:      # in this order: nobody holds it over a fork
            self._tokenizer.encode_special_tokens = not control_tokens
            try:
                if len(text) < _LONG:
                    return self._tokenizer.encode(text, add_special_tokens=special_tokens)
                return self._tokenizer.encode_batch([text], add_special_tokens=special_tokens)[0]
            finally:
                self._tokenizer.encode_special_tokens = True

    def _as_text(self, text: str, after: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of `text` with no control token among them."""
        lead = "\n" if after and self._line else ""
        encoding = self._encode(lead + text, False, False)
        ids, offsets = encoding.ids, encoding.offsets
        if lead and ids[:len(self._line)] == self._line:
            ids, offsets = ids[len(self._line):], [(first - 1, end - 1) for first, end in offsets[len(self._line):]]
        elif lead:
            return self._as_text(text)
        if not (cuts := self._cuts(text, np.array(ids, np.int64))):
            return ids, offsets
        ids, offsets = [], []
        for first, end in zip([0, *cuts], [*cuts, len(text)]):
            found, places = self._as_text(text[first:end], after or first > 0)
            ids, offsets = ids + found, offsets + [(first + a, first + b) for a, b in places]
        return ids, offsets

    def _cuts(self, text: str, ids: np.ndarray) -> list[int]:
        """Where to cut a text that was to have no control tokens and has got some, which it spells: some vocabularies
        (sentencepiece's unigrams) have them as pieces of text. Behind the first character of each."""
        if not self.control_tokens or not (hits := np.isin(ids, list(self.control_tokens))).any():
            return []
        spelled = [token for i in set(ids[hits].tolist()) if len(token := self.control_tokens[i]) > 1]
        return sorted({found.start() + 1 for token in spelled for found in re.finditer(re.escape(token), text)})

    @functools.cached_property
    def _line(self) -> list[int]:
        """Ids of a line's end, where a text's beginning is encoded otherwise than the same text after it; else none."""
        line, alone, after = (self._encode(text, False, False).ids for text in ("\n", "x", "\nx"))
        return line if after[:len(line)] == line and after[len(line):] != alone else []

    @contextlib.contextmanager
    def _words(self, what: str) -> Iterator[None]:
        """The errors of `tokenizers`, and the panics of its Rust (which are no `Exception`), as a UserError."""
        try:
            yield
        except BaseException as error:
            kind = type(error).__name__
            if isinstance(error, UserError) or not (isinstance(error, Exception) or kind == "PanicException"):
                raise
            reason = str(error).strip()[:300] or kind
            raise UserError(f"{self._path}: {what.format(version=tokenizers.__version__, error=reason)}") from None

    def _check_growth(self) -> None:
        """A small file can make a long text, or long work, of a short one: of that it may do only so much."""
        own = self._tokenizer
        with self._words("is no tokenizer of use ({error})"):
            parts = [json.loads(part.__getstate__()) for part in (own.normalizer, own.pre_tokenizer, own.decoder) if part is not None]
            growth = [_growth(part) for part in parts]
            added = own.num_special_tokens_to_add(False)
            affixes = [len(getattr(own.model, name, None) or "") for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")]
            count = sum(map(_count, parts)) + (_count(json.loads(own.post_processor.__getstate__())) if added <= _MOST_ADDED and own.post_processor else 0)
        if max(growth, default=1) > _MOST_GROWTH or added > _MOST_ADDED or max(affixes) > _MOST_ADDED or count > _MOST_PARTS:
            raise UserError(f"{self._path}: makes a text {max(growth, default=1):g} times as long, puts {added} tokens around it or "
                            f"has {count} parts; a tokenizer does none of that, so get the file again")


def _growth(part: dict) -> float:
    """How many times as long a text can become in a normalizer or decoder."""
    if part.get("type") == "Sequence":
        inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
        return float(np.prod([min(_growth(one), 1e9) for one in inner[:_MOST_PARTS + 1]]))
    if part.get("type") == "Replace":
        pattern = part["pattern"].get("String")
        return max(1.0, len(part["content"]) / len(pattern) if pattern else 1.0 + len(part["content"]))
    return 1.0 + sum(len(value) > 100 and key in ("prepend", "replacement", "prefix") for key, value in part.items()
                     if isinstance(value, str)) * _MOST_GROWTH


def _count(value) -> int:
    """Parts in the description of a normalizer, splitter, processor or decoder, inner ones included."""
    if isinstance(value, dict):
        return ("type" in value) + sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, list) else 0


class Detokenizer:
    """Turns the tokens of one reply into text, piece by piece."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._window: list[int] = []      # tokens already shown, for context, then those not yet shown
        self._shown = 0                   # how many of them have been shown
        self._context = ""                # text of those

    def push(self, token: int) -> str:
        """Text that `token` completes; "" while it ends inside a character."""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) <= len(self._context) or text.endswith(_REPLACEMENT):
            return ""
        piece = text[len(self._context):]
        self._window = self._window[self._shown:]
        self._shown = len(self._window)
        self._context = self._decode(self._window)
        return piece

    def finish(self) -> str:
        """What was held back: the incomplete character at the end, as U+FFFD, or a U+FFFD that is really there."""
        piece = self._decode(self._window)[len(self._context):]
        self._window, self._shown, self._context = [], 0, ""
        return piece


class StopStrings:
    """Passes text through until one of `stops` is complete; the stop string itself is left out.

    Text that is not shown (a special token's spelling) is looked through like any other, so that a stop string may be a
    special token or hold some.
    """

    def __init__(self, stops: tuple[str, ...] = ()):
        if not isinstance(stops, (tuple, list)) or any(not isinstance(stop, str) or not stop for stop in stops):
            raise UserError(f"stop strings are {stops!r:.60}; each must be text of at least one character")
        self._stops = stops
        self._held = ""                   # the end of the text, which may be the beginning of a stop string
        self._shown = b""                 # of each of its characters, whether it is shown

    def __bool__(self) -> bool:
        return bool(self._stops)

    def push(self, text: str, shown: bool = True) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string is complete. Call no more after it is."""
        if not self._stops:
            return text if shown else "", False
        text, flags = self._held + text, self._shown + bytes((shown,)) * len(text)
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        end = min(found)[1] if found else len(text) - max(overlap(text, stop) for stop in self._stops)
        self._held, self._shown = text[end:], flags[end:]          # complete first; of those, the longest
        return _visible(text[:end], flags), bool(found)

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = _visible(self._held, self._shown), ""
        return held


def _visible(text: str, shown: bytes) -> str:
    return text if 0 not in shown else "".join(c for c, show in zip(text, shown) if show)


class ReplyText:
    """The text of one reply, from its tokens, up to the first stop string. spelled: control tokens whose spelling is shown."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = (), spelled: frozenset[int] = frozenset()):
        self.tokenizer, self._detokenizer, self._stops, self.spelled = tokenizer, Detokenizer(tokenizer), StopStrings(stops), spelled
        self._special = tokenizer.control_tokens if self._stops or spelled else {}

    def push(self, token: int) -> tuple[str, bool]:
        """Text that `token` completes, and whether a stop string is complete. Call no more after it is."""
        if token in self.spelled:
            held, stopped = self._stops.push(self._detokenizer.finish())
            if stopped:
                return held, True
            text, stopped = self._stops.push(self._special[token])
            return held + text, stopped
        if self._stops and (spelling := self._special.get(token)) is not None:
            return self._stops.push(spelling, shown=False)
        return self._stops.push(self._detokenizer.push(token))

    def finish(self) -> tuple[str, bool]:
        """What was held back, and whether a stop string became complete with it."""
        tail, stopped = self._stops.push(self._detokenizer.finish())
        return (tail, True) if stopped else (tail + self._stops.finish(), False)


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` begins with, short of all of it."""
    return next(n for n in range(min(len(text), len(mark) - 1), -1, -1) if text.endswith(mark[:n]))
