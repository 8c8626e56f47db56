"""What prompts and replies have in common: the keys and values of earlier ones, kept by blocks of tokens.

    prefixes = Prefixes(most_bytes=512 << 20)
    count = prefixes.restore(tokens, cache, row)     # slots of the longest beginning that is kept, put into the row
    prefixes.keep(tokens, cache, row)                # of a row that holds them

A tree: a node is a block of BLOCK tokens after all those of its parents, with the bytes of its slots (`Cache.read`), so a
system prompt that many chats begin with is kept once. Recurrent layers cannot begin anywhere, so some nodes carry their
states too, at least `interval` tokens after the last that does: a model with such layers goes on from the deepest of these.
The least recently used leaf goes first when `most_bytes` is reached. A prompt's last token is never restored, because its
logits are wanted. Not safe among threads: the scheduler's thread owns it.

The tree in radix form is SGLang's (Zheng et al., 2024); blocks of one size are vLLM's (Kwon et al., 2023).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from .backend import BLOCK, Cache, Snapshot

_LEAST_INTERVAL, _MOST_INTERVAL = 128, 1024       # tokens between two kept states
_SLAB = 2 << 20                  # bytes; of 4 MB and more numpy asks for huge pages, which the kernel may take long to find


@dataclass(eq=False)
class Node:
    """One block: its tokens (int64 [BLOCK] as bytes) after those of its parents; data: its slots, uint8; states: of recurrent
    layers after its last token, or none."""

    parent: Node | None
    tokens: bytes = b""
    data: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    states: tuple[np.ndarray, ...] = ()
    children: dict[bytes, Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + sum(array.nbytes for array in self.states)


class _Slabs:
    """Arrays of one size, some from one allocation, and used again: fresh memory costs ten times as much to fill."""

    def __init__(self, most_bytes: int):
        self._most_bytes, self._free = most_bytes, []

    def take(self, width: int) -> np.ndarray:
        """uint8 [width]; every call's width is the same."""
        if not self._free:
            self._free.extend(np.empty((max(1, min(_SLAB, self._most_bytes) // max(1, width)), width), np.uint8))
        return self._free.pop()

    def give(self, array: np.ndarray) -> None:
        self._free.append(array)


class Prefixes:
    def __init__(self, most_bytes: int):
        self.most_bytes, self.nbytes, self.evictions, self.root = most_bytes, 0, 0, Node(None)
        self._slabs, self._width = _Slabs(most_bytes), 0
        # Least recently used first. Parents are touched after their children, so the first one is always a leaf.
        self.order: OrderedDict[Node, None] = OrderedDict()

    def find(self, tokens: np.ndarray, stateful: bool) -> list[Node]:
        """The nodes of the longest kept beginning of tokens [n] that leaves one token; stateful: one that carries states."""
        chain, node, data = [], self.root, np.ascontiguousarray(tokens, np.int64).tobytes()
        for at in range(0, (len(tokens) - 1) // BLOCK * BLOCK * 8, BLOCK * 8):
            node = node.children.get(data[at:at + BLOCK * 8])
            if node is None:
                break
            chain.append(node)
        while stateful and chain and not chain[-1].states:
            chain.pop()
        return chain

    def restore(self, tokens: np.ndarray, cache: Cache, row: int) -> int:
        """Begin `row`, which is empty, with what is kept of tokens int64 [n]; returns how many tokens it holds now."""
        chain = self.find(tokens, bool(cache.states))
        for number, node in enumerate(chain):
            cache.write(row, number * BLOCK, (number + 1) * BLOCK, node.data)
        cache.lengths[row] = len(chain) * BLOCK
        if chain:
            cache.restore(row, Snapshot(len(chain) * BLOCK, chain[-1].states))
            self.touch(chain)
        return len(chain) * BLOCK

    def keep(self, tokens: np.ndarray, cache: Cache, row: int) -> None:
        """Keep the whole blocks of tokens int64 [n], which are what `row` holds (states: if it holds whole blocks alone)."""
        data, chain, node = np.ascontiguousarray(tokens, np.int64).tobytes(), [], self.root
        blocks = len(tokens) // BLOCK
        for number in range(blocks):
            key = data[number * BLOCK * 8:(number + 1) * BLOCK * 8]
            child = node.children.get(key)
            if child is None:
                self.touch(chain)
                place = number * BLOCK, (number + 1) * BLOCK
                self._width = self._width or len(cache.read(row, *place))
                if not self._make_room(self._width, node):
                    return
                child = self.add(node, key, cache.read(row, *place, out=self._slabs.take(self._width)))
            chain.append(node := child)
        self.touch(chain)
        whole = blocks and len(tokens) == blocks * BLOCK == cache.lengths[row]
        if cache.states and whole and not node.states and _since_states(chain) >= interval(cache, row, node):
            states = cache.snapshot(row).states
            if self._make_room(sum(array.nbytes for array in states), node):
                node.states = states
                self.nbytes += sum(array.nbytes for array in states)

    def add(self, parent: Node, tokens: bytes, data: np.ndarray, states: tuple[np.ndarray, ...] = ()) -> Node:
        """A new node; `touch` its chain after."""
        node = parent.children[tokens] = Node(parent, tokens, data, states)
        self.nbytes += node.nbytes
        self.order[node] = None
        return node

    def touch(self, chain: list[Node]) -> None:
        """Nodes, each behind its parent, are used."""
        for node in reversed(chain):
            self.order.move_to_end(node)

    def clear(self) -> None:
        self.__init__(self.most_bytes)

    def _make_room(self, wanted: int, node: Node) -> bool:
        """Drop leaves, the least recently used first, until there is room for `wanted` bytes; False: it would take `node`."""
        while self.nbytes + wanted > self.most_bytes:
            oldest = next(iter(self.order), None)
            if oldest is None or oldest is node:
                return False
            del self.order[oldest], oldest.parent.children[oldest.tokens]
            self.nbytes -= oldest.nbytes
            self._slabs.give(oldest.data)
            self.evictions += 1
        return True


def interval(cache: Cache, row: int, node: Node) -> int:
    """Tokens between two kept states of a row: so that these take at most four times the room of keys and values."""
    states, slot = sum(array[0, row].nbytes for array in cache.states.arrays), max(1, node.data.nbytes // BLOCK)
    whole = min(max(states // (4 * slot), _LEAST_INTERVAL), _MOST_INTERVAL)
    return -(-whole // _LEAST_INTERVAL) * _LEAST_INTERVAL


def _since_states(chain: list[Node]) -> int:
    """Tokens of a chain after the last node before its end that carries states."""
    count = 1
    while count < len(chain) and not chain[-1 - count].states:
        count += 1
    return count * BLOCK
