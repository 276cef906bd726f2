"""The rows of every batch shared among the processes of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxlm.data.batch import IGNORE, TARGETS, Batch, BatchSource
from mlxlm.errors import UsageError


class RowShare:
    """The rows index, index + size, index + 2 size ... of every batch of a source. A `BatchSource`.

    All processes read the same source, so their batches together are exactly its batches, row i in process i % size,
    whatever the objective draws by chance, and its state is theirs: a run goes on exactly with another number of
    processes. A process without a row in a batch gets another's with nothing to learn in it, so that it can take the
    step with all others.

    index, size: of this process, and how many there are.
    """

    def __init__(self, source: BatchSource, index: int, size: int):
        if not 0 <= index < size:
            raise UsageError(f"share {index} of {size}; expected 0 <= index < size")
        self.source, self.index, self.size = source, index, size

    @property
    def epoch(self) -> int:
        """Finished passes over the data."""
        return self.source.epoch

    @property
    def num_tokens(self) -> int:
        """Tokens that all processes together have read."""
        return self.source.num_tokens

    def next(self) -> Batch | None:
        """This process's rows of the next batch; None at the end of the source."""
        batch = self.source.next()
        if batch is None:
            return None
        rows = batch["tokens"].shape[0]
        if self.index < rows:
            return {name: array[self.index :: self.size] for name, array in batch.items()}
        return {
            name: np.full_like(array[-1:], IGNORE) if name in TARGETS else array[-1:] for name, array in batch.items()
        }

    def state(self) -> dict[str, Any]:
        """That of the source, the same in every process."""
        return self.source.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See `BatchSource.restore`."""
        self.source.restore(state)
