"""Kept prefixes (prefixes.py) in one file, which another process of the same bundle and backend reads.

In safetensors' layout: 8 bytes with the length of a JSON header, the header, the arrays one after the other. "parent" int64
[n]: the node that a node follows, which stands before it, or -1; "tokens" int64 [n, BLOCK]; "slots" uint8 [n, bytes]; "holder"
int64 [m] and "states.i" float32 [m, ...]: which nodes carry states, and these. The header's __metadata__ names the model.
"""

import json
from pathlib import Path

import numpy as np

from .backend import BLOCK, Cache
from .errors import UserError
from .files import new_file, parse_json
from .prefixes import Node, Prefixes

_LARGEST_HEADER = 1 << 20
_TYPES = {"I64": np.int64, "U8": np.uint8, "F32": np.float32}


def save(path: Path, identity: str, prefixes: Prefixes) -> int:
    """Write them; returns their tokens. Raises UserError where the file cannot be written."""
    nodes = _parents_first(prefixes)
    number = {node: i for i, node in enumerate(nodes)}
    holders = [i for i, node in enumerate(nodes) if node.states]
    width = len(nodes[0].data) if nodes else 0
    arrays = {"parent": ("I64", [len(nodes)], [np.array([number.get(node.parent, -1) for node in nodes], np.int64)]),
              "tokens": ("I64", [len(nodes), BLOCK], [np.frombuffer(node.tokens, np.int64) for node in nodes]),
              "slots": ("U8", [len(nodes), width], [node.data for node in nodes]),
              "holder": ("I64", [len(holders)], [np.array(holders, np.int64)])}
    for part, array in enumerate(nodes[holders[0]].states if holders else ()):
        arrays[f"states.{part}"] = "F32", [len(holders), *array.shape], [np.ascontiguousarray(nodes[i].states[part]) for i in holders]
    header, at = {"__metadata__": {"format": "edgewright-prefixes", "of": identity}}, 0
    for name, (dtype, shape, parts) in arrays.items():
        size = sum(part.nbytes for part in parts)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, parts in arrays.values():
            for part in parts:
                file.write(part.data)
    return len(nodes) * BLOCK


def load(path: Path, identity: str, prefixes: Prefixes, cache: Cache) -> int:
    """Add what a file holds and fits; returns the tokens added. cache: an empty one of the backend, of BLOCK slots or more.
    Raises UserError for a file that is not of this model and backend, or damaged."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LARGEST_HEADER:
                raise ValueError("its header is too long")
            header = parse_json(file.read(length))
            begin, size = file.tell(), path.stat().st_size
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{path}: no file of kept prefixes ({getattr(error, 'strerror', None) or error})") from None
    try:
        of = header["__metadata__"]["of"]
        if of != identity:
            raise UserError(f"{path}: kept by {of}, and this is {identity}; save it again with this one")
        arrays = {name: _array(path, begin, size, entry) for name, entry in header.items() if name != "__metadata__"}
        return _take_in(arrays, prefixes, cache)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: damaged ({error!r}); remove it") from None


def _array(path: Path, begin: int, size: int, entry: dict) -> np.ndarray:
    """One array, mapped: read as it is used."""
    dtype, (first, end), shape = np.dtype(_TYPES[entry["dtype"]]), entry["data_offsets"], tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, first, end)) or begin + end > size:
        raise ValueError("an array lies outside the file")
    if end - first != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError("an array has another size than its shape says")
    return np.memmap(path, dtype, "r", begin + first, shape) if end > first else np.empty(shape, dtype)


def _take_in(arrays: dict[str, np.ndarray], prefixes: Prefixes, cache: Cache) -> int:
    parents, tokens, slots, holders = (arrays[name] for name in ("parent", "tokens", "slots", "holder"))
    count, kept, width = len(parents), cache.snapshot(0).states, len(cache.read(0, 0, BLOCK))
    if tokens.shape != (count, BLOCK) or slots.shape != (count, width) and count or (parents >= np.arange(count)).any() or (parents < -1).any():
        raise ValueError("its blocks are not this model's")
    states = [arrays[f"states.{part}"] for part in range(len(kept))] if len(holders) else []
    if any(array.shape != (len(holders), *own.shape) for array, own in zip(states, kept)):
        raise ValueError("its states are not this model's")
    carried = {int(holder): tuple(np.array(array[i]) for array in states) for i, holder in enumerate(holders)}
    nodes: list[Node | None] = []
    for i in range(count):
        parent, key = prefixes.root if parents[i] < 0 else nodes[parents[i]], tokens[i].tobytes()
        node = parent.children.get(key) if parent else None
        if parent and node is None and prefixes.nbytes + width + sum(array.nbytes for array in carried.get(i, ())) <= prefixes.most_bytes:
            node = prefixes.add(parent, key, np.array(slots[i]), carried.get(i, ()))
        nodes.append(node)
    there = [node for node in nodes if node]
    prefixes.touch(there)
    return len(there) * BLOCK


def _parents_first(prefixes: Prefixes) -> list[Node]:
    nodes = list(prefixes.root.children.values())
    for node in nodes:
        nodes += node.children.values()
    return nodes
