"""Seeded damage: to bytes, to JSON, to the header of a safetensors file, to a folder of files.

Every function takes a random.Random and says what it touched as (file, path within its JSON or ()), so that an oracle
can know what the damage may change.
"""

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

Touched = tuple[str, tuple]
ODD = (None, True, False, -1, 0, 1, 2, 3, 7, 64, 1000, 2**31 - 1, 2**31, 2**32 + 1, 2**53 + 1, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e-45,
       1e30, 1e308, "", "x", "-1", "1", "float32", "int4", "../x", "/etc/passwd", "a\0b", "\ud800", "é" * 3000, [], {}, [[]], [1] * 500, [None],
       {"a": {}}, {"": 0})
WORDS = (b"NaN", b"Infinity", b"1e999", b"[" * 3000, b'{"a":' * 500, b"9" * 6000, b"\xff\xfe", b"\x00", b'"', b"}", b",", b"\\u", b"\xef\xbb\xbf")
NESTED = "@nested "               # what `dumps` writes as so many brackets: json.dumps has a limit of its own


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes of a few bytes, or a piece cut, doubled or blanked."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64, 1000))
        piece = slice(at, min(len(data), at + length))
        match rng.randrange(8):
            case 0: data[piece] = b""
            case 1: data[at:at] = data[piece]
            case 2: data[piece] = bytes(len(data[piece]))
            case 3: data[piece] = b"\xff" * len(data[piece])
            case 4: del data[at:]
            case 5: data[at:at] = rng.choice(WORDS)
            case 6: data[piece] = rng.randbytes(len(data[piece]))
            case 7:
                for i in range(piece.start, min(piece.stop, piece.start + 4)):
                    data[i] ^= 1 << rng.randrange(8)
    return bytes(data)


def places(value, path=()) -> list[tuple]:
    """The path of every value in a JSON document, its own () first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def mutate_json(rng: random.Random, value, within: tuple = ()) -> tuple[object, tuple]:
    """A copy of the document with one change, and the path of what changed, below `within` where that is given."""
    value = json.loads(json.dumps(value))
    everywhere = places(value)
    paths = [path for path in everywhere if len(path) > len(within) and path[:len(within)] == within]
    if not paths:
        return rng.choice(ODD), ()
    # Short paths are few and long ones many: first a depth, then a path of that depth.
    depth = rng.choice(sorted({len(path) for path in paths}))
    path = rng.choice([path for path in paths if len(path) == depth])
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    key, old = path[-1], owner[path[-1]]
    match rng.randrange(8):
        case 0: del owner[key]
        case 1 | 2: owner[key] = rng.choice(ODD)
        case 3 if isinstance(old, (int, float)) and not isinstance(old, bool):
            owner[key] = rng.choice((old + 1, old - 1, old * 2, -old, old / 3, old * 1e6, float(old), str(old), int(old) + 2**32))
        case 3 if isinstance(old, str):
            owner[key] = rng.choice((old + "x", old[:-1], old.upper(), old[::-1], old * 3, [old], "../" + old, old + "\0"))
        case 4 if isinstance(owner, dict): owner[rng.choice((f"{key}_", "type", "extra", ""))] = owner.pop(key)
        case 4: owner.insert(key, old)
        case 5:
            other = value
            for part in rng.choice(everywhere):
                try:
                    other = other[part]
                except (KeyError, IndexError, TypeError):
                    break
            owner[key] = json.loads(json.dumps(other))
        case 6 if len(owner) > 1:
            other = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
            owner[key], owner[other] = owner[other], old
        case 7: owner[key] = f"{NESTED}{rng.choice((1, 90, 2000))}"
        case _: owner[key] = rng.choice(ODD)
    return value, path


def dumps(value) -> bytes:
    return re.sub(f'"{NESTED}(\\d+)"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), json.dumps(value)).encode()


def mutate_json_file(rng: random.Random, file: Path, within: tuple = ()) -> Touched:
    data = file.read_bytes()
    if rng.random() < 0.2:
        file.write_bytes(mutate_bytes(rng, data))
        return file.name, ()
    try:
        value, path = mutate_json(rng, json.loads(data), within)
    except (ValueError, RecursionError):                     # damaged already, by a first change
        file.write_bytes(mutate_bytes(rng, data))
        return file.name, ()
    file.write_bytes(dumps(value))
    return file.name, path


def mutate_safetensors(rng: random.Random, file: Path) -> Touched:
    """The tensors' bytes, or the header."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4 and data:
        at = rng.randrange(min(8 + size, len(data) - 1), len(data))
        piece = data[at:at + rng.choice((1, 2, 4, 64))]
        new = rng.choice((bytes(len(piece)), b"\xff" * len(piece), rng.randbytes(len(piece)), b"\x00\x7c" * (len(piece) // 2)))
        file.write_bytes(data[:at] + new[:len(piece)].ljust(len(piece), b"\0") + data[at + len(piece):])
        return file.name, ("tensors",)
    if rng.random() < 0.2:
        file.write_bytes(mutate_bytes(rng, data))
        return file.name, ()
    try:
        header, path = mutate_json(rng, json.loads(data[8:8 + size]))
    except (ValueError, RecursionError):                     # damaged already, by a first change
        file.write_bytes(mutate_bytes(rng, data))
        return file.name, ()
    text = dumps(header)
    text = text.ljust(-(-len(text) // 8) * 8)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, len(text) - 1, len(text) + 8, 2**40, 2**63))
    file.write_bytes(length.to_bytes(8, "little") + text + data[8 + size:])
    return file.name, ("header", *path)


def mutate_folder(rng: random.Random, folder: Path, others: list[Path]) -> Touched:
    """A file that is not what it was: gone, empty, another's, a link, a folder, a FIFO."""
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    data, stranger = file.read_bytes(), rng.choice(sorted(path for other in others for path in other.iterdir() if path.is_file()))
    same = [other / file.name for other in others if (other / file.name).is_file()]
    file.unlink()
    match rng.randrange(8):
        case 0: pass
        case 1: file.touch()
        case 2: shutil.copyfile(stranger, file)
        case 3: file.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "/dev/full", "nowhere", file.name)))
        case 4: file.mkdir()
        case 5: os.mkfifo(file)
        case _: shutil.copyfile(rng.choice(same), file) if same else file.write_bytes(data[: len(data) // 2])
    return file.name, ()


def fix_hashes(folder: Path) -> None:
    """Enter the files' sizes and hashes in a bundle's manifest, where it can still be read, so that they are no hindrance."""
    file = folder / "manifest.json"
    if not file.is_file():
        return
    try:
        manifest = json.loads(file.read_bytes())
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.is_file() and path.stat().st_size < 1 << 24:
                data = path.read_bytes()
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if manifest["weights"]["file"] in manifest["files"]:
            manifest["weights"]["bytes"] = manifest["files"][manifest["weights"]["file"]]["bytes"]
        file.write_text(json.dumps(manifest))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
