"""What data readers hand to a trainer: the batch, the source of batches and the face of an objective.

Arrays in a batch are NumPy arrays; the trainer moves them to the device. Shapes use B for rows and L for the padded
row length.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]
"""Named arrays of one step: `tokens` (B, L) int32, `targets` int32 (or `labels`), and keywords of the model's
`hidden` method such as `key_lengths`, `segments`, `positions` or `decoder_tokens`."""

IGNORE = -100
"""The target of a place whose prediction is not scored."""

TARGETS = ("targets", "labels", "next_sentence_labels")
"""Arrays of a batch that say what is to be learned."""


@runtime_checkable
class BatchSource(Protocol):
    """A stream of batches whose place can be saved and restored exactly.

    Attributes:
        epoch: the number of whole passes over the data finished so far.
        num_tokens: the number of tokens handed out so far.
    """

    epoch: int
    num_tokens: int

    def next(self) -> Batch | None:
        """The next batch, or None once a bounded stream has ended."""
        ...

    def state(self) -> dict[str, Any]:
        """The reader's place as values that JSON can hold."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a place that `state` gave: `next` then returns exactly what it would have returned there."""
        ...


@runtime_checkable
class RowObjective(Protocol):
    """The part of a training objective that a reader needs: how raw rows become a batch.

    Attributes:
        packs: whether several documents share a row (with segments and positions reset at each document).
    """

    packs: bool

    def row_length(self, max_length: int) -> int:
        """The number of raw tokens of a row so that the row the model reads has at most `max_length` places."""
        ...

    def batch(self, rows: list[list[np.ndarray]], rng: np.random.Generator, max_length: int) -> Batch:
        """Make a batch of rows, each a list of document pieces (1-D token arrays), drawing chances from `rng`."""
        ...
