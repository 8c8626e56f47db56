"""States of recurrent rows: which copy is read and written, where a row may go on or back to, and what is refused."""

import numpy as np
import pytest

from runtime.backend import Cache, States
from runtime.errors import UserError


class Sums(Cache):
    """A "model" whose recurrent state of a row is the list of its tokens, in two arrays; it has no keys."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        if self.states is None:
            rows = len(self.lengths)
            self.states = States([np.zeros((2, rows, 40), np.float32), np.zeros((2, rows, 1), np.float32)])

    def _copy_slots(self, source, target):
        pass

    def grow(self, capacity):
        pass

    read = write = None

    def forward(self, write_index, tokens):
        """tokens: a list for each row. Gives what each row's state says its tokens are."""
        write_index, counts = np.array(write_index), np.array([len(some) for some in tokens])
        read, states = self.states.begin(write_index), self.states
        for row, some in enumerate(tokens):
            for array in states.arrays:
                array[1 - states.copy[row], row] = array[read[row], row] if read[row] >= 0 else 0
            held, length = (array[1 - states.copy[row], row] for array in states.arrays)
            for token in some:
                held[int(length[0])] = token
                length += 1
        states.end(write_index, counts)
        self.lengths[:] = write_index + counts
        return [self.tokens(row) for row in range(self.rows)]

    def tokens(self, row):
        held, length = (array[self.states.copy[row], row] for array in self.states.arrays)
        return held[:int(length[0])].tolist()


def new(rows=1):
    return Sums(None, None, 40, np.zeros(rows, np.int64))


def test_rows_go_on_back_and_begin_anew():
    cache = new(2)
    assert cache.forward([0, 0], [[1, 2, 3], [7]]) == [[1, 2, 3], [7]]
    assert cache.forward([3, 1], [[4], [8, 9]]) == [[1, 2, 3, 4], [7, 8, 9]]
    assert cache.forward([4, 3], [[], [10]]) == [[1, 2, 3, 4], [7, 8, 9, 10]]            # a row of padding alone stays
    cache.truncate(1, 3)
    cache.truncate(1, 20)                                                               # beyond its end: nothing
    assert cache.forward([4, 3], [[5], [11]]) == [[1, 2, 3, 4, 5], [7, 8, 9, 11]]
    cache.truncate(0, 0)
    assert cache.forward([0, 4], [[6], [12]]) == [[6], [7, 8, 9, 11, 12]]
    cache.truncate(0, 0)                                                                # as before the last call
    assert cache.forward([0, 5], [[6, 7], []])[0] == [6, 7]


def test_snapshots_bring_back_what_was_kept():
    cache = new(2)
    cache.forward([0, 0], [[1, 2, 3], [4]])
    kept = cache.snapshot(0)
    cache.forward([3, 1], [[4, 5], [5]])
    cache.forward([5, 2], [[6], [6]])
    with pytest.raises(UserError, match="cannot go back to 3 tokens.*snapshot at 3"):
        cache.truncate(0, 3)
    cache.restore(0, kept)
    assert cache.lengths.tolist() == [3, 3] and cache.tokens(0) == [1, 2, 3] and cache.tokens(1) == [4, 5, 6]
    assert cache.forward([3, 3], [[9], [7]]) == [[1, 2, 3, 9], [4, 5, 6, 7]]
    cache.truncate(0, 0)
    with pytest.raises(UserError, match="snapshot of 3 tokens"):
        cache.restore(0, kept)


def test_a_call_elsewhere_is_refused_and_an_interrupted_one_leaves_nothing_to_go_back_to():
    cache = new(2)
    cache.forward([0, 0], [[1, 2, 3], [4]])
    with pytest.raises(UserError, match="row 1 cannot go on at slot 2"):
        cache.forward([3, 2], [[1], [1]])
    cache.states.begin(np.array([3, 1]))                                                # and no end
    with pytest.raises(UserError, match="before the last call: -1"):
        cache.truncate(0, 2)
    assert cache.forward([3, 1], [[4], [5]]) == [[1, 2, 3, 4], [4, 5]]


def test_forks_and_views_share_and_copy():
    cache = new(3)
    view = cache.view(1, 3)
    view.forward([0, 0], [[1], [2, 3]])
    assert cache.states.held.tolist() == [0, 1, 2] and cache.tokens(2) == [2, 3]
    cache.fork(2, 0)
    assert cache.forward([2, 1, 2], [[4], [5], [6]]) == [[2, 3, 4], [1, 5], [2, 3, 6]]
    cache.truncate(0, 2)
    assert cache.tokens(0) == [2, 3]
