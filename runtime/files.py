"""The one place where files are written and JSON and TOML are read.

    with new_folder(out) as folder:            # a temporary sibling, which takes the place of `out` when it is whole
        ...
    with new_file(out) as file: ...            # the same for one file; `write(out, text or bytes)` for short ones
    with lock(out): ...                        # nobody else writes `out` meanwhile
    data = read_json(file)                     # an object, or a UserError that names the file

**Writing.** What is written as NAME lies beside it as `.NAME.partial` until it is whole and on the disk, then takes its
place by one rename (two folders change places by Linux's RENAME_EXCHANGE; elsewhere the older one waits as `.NAME.old`
between two renames, and `restored` or the next writer puts it back after a crash). `.NAME.lock` is held by flock
meanwhile, so a second writer is refused or waits, a killed one's lock is free, and who holds it may remove what a killed
one left. File systems without flock give up the lock alone.

**Reading.** Bounded before anything is parsed: bytes, nesting, digits of a number; nothing but a regular file is opened,
so a FIFO does not block. Of equal keys the last counts, as everywhere in Python.
"""

import functools
import glob
import json
import math
import os
import shutil
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ImportError:                       # Windows: no locks
    fcntl = None

LARGEST = 32 << 20                        # bytes of a JSON file, unless a caller knows better
LARGEST_TOKENIZER = 64 << 20              # of a tokenizer.json; the largest in use have 33 MB
DEEPEST = 100                             # levels of nesting
DIGITS = 100                              # of a whole number
_OTHERS = bytes(set(range(256)) - set(b'[]{}"'))
_SQUARE = bytes.maketrans(b"{}", b"[]")
_AS_ZERO = bytes.maketrans(b"123456789", b"000000000")
_EXCHANGE, _HERE = 2, -100                # RENAME_EXCHANGE and AT_FDCWD of Linux

_held: set[tuple[str, int]] = set()       # (lock file, thread)


@contextmanager
def lock(out: Path | str, wait: bool = False) -> Iterator[None]:
    """Be the only writer of `out`, a file or folder. One thread may hold it several times over.

    Where another process or thread holds it: UserError, or with `wait` its turn is waited for.
    """
    out = _target(out)
    file = _beside(out, "lock")
    key = str(file), threading.get_ident()
    if key in _held:
        yield
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(file, out, wait) if fcntl is not None else None
    except OSError as error:
        raise _unwritable(out, error) from None
    _held.add(key)
    try:
        yield
    finally:
        _held.remove(key)
        if handle is not None:
            file.unlink(missing_ok=True)
            os.close(handle)


def sole_writer(option: str):
    """Decorates a stage that adds to a folder: options.OPTION is locked from reading what is there to writing it back."""
    def decorate(stage):
        @functools.wraps(stage)
        def alone(options):
            with adding_to(Path(getattr(options, option))):
                return stage(options)
        return alone
    return decorate


def adding_to(folder: Path):
    """`lock` of a folder that is there; none where a lock has no place beside it, as beside a mounted volume."""
    return lock(folder) if folder.is_dir() and os.access(_target(folder).parent, os.W_OK) else nullcontext()


@contextmanager
def new_folder(out: Path | str) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place when the block ends without an error.

    Raises UserError where another process writes `out`, the disk is full or the place cannot be written (an OSError of
    the block's counts as one of these); then nothing at `out` has changed.
    """
    out = _target(out)
    with _partial(out, wait=False) as partial:
        _restore(out)
        partial.mkdir()
        yield partial
        for folder, _, names in os.walk(partial):
            for path in (*(os.path.join(folder, name) for name in names), folder):
                _to_disk(path)
        _swap(partial, out)
        _to_disk(out.parent)


@contextmanager
def new_file(out: Path | str) -> Iterator[Path]:
    """A path beside `out` to write to; the file takes the place of `out` when the block ends without an error.

    Two writers take turns. Raises UserError as `new_folder` does.
    """
    out = _target(out)
    with _partial(out, wait=True) as partial:
        yield partial
        _to_disk(partial)
        os.replace(partial, out)


@contextmanager
def _partial(out: Path, wait: bool) -> Iterator[Path]:
    """The path at which `out` is written, under its lock: free before and after."""
    partial = _beside(out, "partial")
    try:
        with lock(out, wait):
            _remove(partial)                                      # left by a killed run
            try:
                yield partial
            finally:
                _remove(partial)
    except OSError as error:
        raise _unwritable(out, error) from None


def write(out: Path | str, data: str | bytes) -> None:
    """Write a whole file or nothing. Raises UserError where it cannot be written."""
    with new_file(out) as file:
        file.write_bytes(data.encode() if isinstance(data, str) else data)


def work_folder(out: Path, plan, suffix: str = "work") -> Path:
    """Where the state of exactly this plan (plain data) for `out` waits while it is not finished: a hidden folder beside it."""
    import hashlib
    key = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return _beside(out, f"{key}.{suffix}")


def clear_work(out: Path) -> None:
    """Remove the work folders of `out`, of other plans too, and what they left: it is finished.

    Each goes by one rename first, so that what a kill leaves of it is never taken for work to go on with.
    """
    gone = _beside(out, "partial")
    for dots in (".", ".."):                                      # its own, and those of its work folders
        for folder in out.parent.glob(f"{dots}{glob.escape(out.name)}.{'[0-9a-f]' * 12}.*"):
            _remove(gone)
            os.rename(folder, gone)
    _remove(gone)


def tidy(out: Path) -> None:
    """Put right what a killed writer of `out` left, where the next one may have nothing to write."""
    with lock(out):
        _restore(out)
        _remove(_beside(out, "partial"))


def restored(folder: Path) -> Path:
    """`folder`, after putting right what a killed writer left: `.NAME.old` in its place, `.NAME.lock` beside it."""
    stale = _beside(_target(folder), "lock")
    mine = (str(stale), threading.get_ident()) in _held
    if not mine and (os.path.exists(stale) or not os.path.exists(folder) and os.path.exists(_beside(folder, "old"))):
        try:
            tidy(folder)
        except UserError:                                         # a live writer will do it, or nobody may
            pass
    return folder


def _target(out: Path | str) -> Path:
    out = Path(out).absolute()
    return Path(os.path.realpath(out)) if os.path.islink(out) else out


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}.{suffix}")


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(f"{out} could not be written ({error.strerror or error}): nothing was changed there")


def _locked(file: Path, out: Path, wait: bool) -> int:
    """A handle of the lock file, locked. Its holder removes it, so one that was waited for may be gone by then."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                os.close(handle)
                raise UserError(f"{out} is being written by another process: wait for it, or choose another name") from None
            print(f"{out}: waiting for the process that writes it", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:                                           # this file system has no locks
            return handle
        try:
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _restore(out: Path) -> None:
    old = _beside(out, "old")
    if old.exists() and not out.exists():
        os.rename(old, out)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path | str) -> None:
    """What is written reaches the disk before the rename does: a file, or a folder's list of names."""
    if fcntl is None:                                             # Windows writes out only what is open for writing
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:                                               # a link to nothing
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(new: Path, out: Path) -> None:
    """Put folder `new` at `out`. What was there is at `new` afterwards, or removed."""
    if not out.exists():
        os.rename(new, out)
    elif not _exchange(new, out):
        old = _beside(out, "old")
        os.rename(out, old)
        try:
            os.rename(new, out)
        except BaseException:
            os.rename(old, out)
            raise
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the two could change places in one step."""
    import ctypes
    function = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return function is not None and function(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def read_bytes(file: Path, largest: int = LARGEST) -> bytes:
    """A regular file of at most `largest` bytes. Raises OSError where it cannot be read, ValueError for what is refused."""
    info = os.stat(file)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("it is not a file")
    if info.st_size > largest:
        raise ValueError(f"{info.st_size} bytes, where {largest} is the limit")
    return Path(file).read_bytes()


def read_json(file: Path, kind: type | None = dict, mend: str = "", largest: int = LARGEST, strict: bool = True):
    """What a JSON file holds: of `kind`, dict or list (None: anything). See parse_json.

    mend: what the reader of an error should do. Raises UserError, beginning with the file.
    """
    mend = f"; {mend}" if mend else ""
    try:
        value = parse_json(read_bytes(file, largest), strict)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}){mend}") from None
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON ({error}){mend}") from None
    if kind is not None and not isinstance(value, kind):
        raise UserError(f"{file}: holds {type(value).__name__}, where a JSON {'object' if kind is dict else 'array'} should be{mend}")
    return value


def parse_json(data: str | bytes, strict: bool = True):
    """JSON within bounds: UTF-8, DEEPEST levels, whole numbers of DIGITS; `strict` also refuses NaN, infinities and half
    characters, for readers that do not look. Raises ValueError."""
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if _depth(data) > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep, or brackets that do not close")
    bounds = {"parse_constant": _refuse, "parse_float": _finite} if strict else {}
    if b"0" * DIGITS in data.translate(_AS_ZERO):
        bounds["parse_int"] = _whole
    try:
        value = json.loads(data.decode(), **bounds)
        if strict and (b"\\ud" in data or b"\\uD" in data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise ValueError("a text with half a character (a lone surrogate)") from None
    except RecursionError:                                        # the caller's own stack is nearly full
        raise ValueError("nested too deep") from None
    return value


def read_toml(file: Path) -> dict:
    """What a TOML file holds, within the bounds of JSON. Raises UserError, beginning with the file."""
    import tomllib
    try:
        value = tomllib.loads(read_bytes(file, 1 << 20).decode())
        parse_json(json.dumps(value, default=str))                # dotted keys nest without a bracket
        return value
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{file} cannot be read as TOML ({reason})") from None


def _depth(data: bytes) -> int:
    """Levels of nesting, or more: what is outside of texts is folded from the inside, a level a time."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    rest = b"".join(data.translate(_SQUARE, _OTHERS).split(b'"')[::2])
    for level in range(DEEPEST + 1):
        folded = rest.replace(b"[]", b"")
        if folded == rest:
            return level + len(rest)
        rest = folded
    return DEEPEST + 1


def _refuse(name: str):
    raise ValueError(f"{name}, where a number should be")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(text)
    return value


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
