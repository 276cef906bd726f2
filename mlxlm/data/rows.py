"""How documents become rows: packed without a gap, or one piece a row. Any row of an epoch can be had by its number."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mlxlm.data.store import TokenStore


class Rows(Protocol):
    """The rows of one pass over a store."""

    lengths: np.ndarray  # (rows,) tokens of each

    def row(self, number: int) -> list[np.ndarray]:
        """The pieces of documents in a row."""
        ...


def _order(count: int, seed: int, epoch: int, purpose: int, shuffle: bool) -> np.ndarray:
    if not shuffle:
        return np.arange(count)
    return np.random.default_rng([seed, epoch, purpose]).permutation(count)


def num_rows(store: TokenStore, length: int, packs: bool) -> int:
    """Rows of a pass: the same in every epoch."""
    if packs:
        return -(-store.num_tokens // length)
    return int((-(-store.lengths // length)).sum())


class PackedRows:
    """Documents in (shuffled) order, one behind the other, cut every `length` tokens: only the last row is shorter.

    A document that crosses an edge goes on as another piece in the next row; no token is lost or repeated. Rows are
    then shuffled too, so that pieces of one long document do not follow each other.
    """

    def __init__(self, store: TokenStore, length: int, seed: int, epoch: int, shuffle: bool) -> None:
        self._store, self._length = store, length
        self._documents = _order(len(store), seed, epoch, 0, shuffle)
        self._ends = np.cumsum(store.lengths[self._documents])
        total = int(self._ends[-1]) if len(self._ends) else 0
        count = -(-total // length)
        self._rows = _order(count, seed, epoch, 1, shuffle)
        self.lengths = np.minimum(length, total - self._rows * length)
        self._total = total

    def row(self, number: int) -> list[np.ndarray]:
        """The pieces of a row, in the order of the documents."""
        start = int(self._rows[number]) * self._length
        stop = min(start + self._length, self._total)
        place = int(np.searchsorted(self._ends, start, side="right"))
        pieces = []
        while start < stop:
            document = int(self._documents[place])
            first = int(self._ends[place]) - int(self._store.lengths[document])
            end = min(stop, int(self._ends[place]))
            pieces.append(self._store.tokens(document, start - first, end - first))
            start, place = end, place + 1
        return pieces


class SingleRows:
    """One piece of one document a row; documents longer than `length` are cut into pieces of `length` and the rest."""

    def __init__(self, store: TokenStore, length: int, seed: int, epoch: int, shuffle: bool) -> None:
        self._store, self._length = store, length
        counts = -(-store.lengths // length)
        documents = np.repeat(np.arange(len(store)), counts)
        piece = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = _order(len(documents), seed, epoch, 0, shuffle)
        self._documents, self._starts = documents[order], (piece * length)[order]
        self.lengths = np.minimum(length, store.lengths[self._documents] - self._starts)

    def row(self, number: int) -> list[np.ndarray]:
        """The row's only piece."""
        start = int(self._starts[number])
        return [self._store.tokens(int(self._documents[number]), start, start + self._length)]
