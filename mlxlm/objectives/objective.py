"""What all objectives have in common."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mlxlm.data.batch import Batch

# A row: pieces of documents, each an array of token ids.
Row = list[np.ndarray]


class Objective(Protocol):
    """Makes batches of raw rows. Frozen settings and ids of special tokens; all chance comes from the caller.

    packs: whether pieces of several documents share a row; otherwise a row is one piece. Readers may end a document
    with the end-of-text token.
    """

    @property
    def packs(self) -> bool:
        """Whether several documents share a row."""

    def row_length(self, max_length: int) -> int:
        """Raw tokens of a row whose batch has `max_length` columns."""

    def batch(self, rows: list[Row], rng: np.random.Generator, max_length: int) -> Batch:
        """The batch of these rows, at most `max_length` columns wide. The same rng state gives the same batch."""
