"""Batches shared among the processes of a run: the rows of each, or a part of every row.

All processes read the same source and keep what is theirs, so that together they have exactly its batches, whatever the
objective draws by chance, and its state is that of all of them: a run goes on exactly with another number of processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxlm.data.batch import IGNORE, TARGETS, Batch, BatchSource
from mlxlm.errors import UsageError


class _Share:
    """This process's share of the batches of a source. A `BatchSource`.

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
    def batches_per_epoch(self) -> int | None:
        """Batches of a pass, None where the source does not say."""
        return getattr(self.source, "batches_per_epoch", None)

    @property
    def num_tokens(self) -> int:
        """Tokens that all processes together have read."""
        return self.source.num_tokens

    def next(self) -> Batch | None:
        """This process's share of the next batch; None at the end of the source."""
        batch = self.source.next()
        return None if batch is None else self._share(batch)

    def state(self) -> dict[str, Any]:
        """That of the source, the same in every process."""
        return self.source.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See `BatchSource.restore`."""
        self.source.restore(state)

    def _share(self, batch: Batch) -> Batch:
        raise NotImplementedError


class RowShare(_Share):
    """The rows index, index + size, index + 2 size ... of every batch of a source. A `BatchSource`.

    A process without a row in a batch gets another's with nothing to learn in it, so that it can take the step with all
    others.
    """

    def _share(self, batch: Batch) -> Batch:
        return share_rows(batch, self.index, self.size)


def share_rows(batch: Batch, index: int, size: int) -> Batch:
    """The rows index, index + size ... of a batch, or its last one with nothing to learn in it, see `RowShare`."""
    if index < batch["tokens"].shape[0]:
        return {name: array[index::size] for name, array in batch.items()}
    return {name: np.full_like(array[-1:], IGNORE) if name in TARGETS else array[-1:] for name, array in batch.items()}


class ColumnShare(_Share):
    """Part `index` of `size` equal parts of the rows of a source's batches. A `BatchSource`.

    Rows are filled up at the end so that all parts are equally long. Arrays of whole rows, such as key_lengths, stay
    what they are. Raises UsageError for batches whose labels are about whole rows.
    """

    def _share(self, batch: Batch) -> Batch:
        whole = [name for name in TARGETS if name in batch and batch[name].ndim == 1]
        if whole:
            raise UsageError(f"{whole[0]} are about whole rows; sequence parallelism gives each process a part of them")
        rows, length = batch["tokens"].shape
        if length % self.size and not {"key_lengths", "segments"} & batch.keys():
            batch = {**batch, "key_lengths": np.full(rows, length, dtype=np.int32)}
        return {name: self._part(name, array) if array.ndim == 2 else array for name, array in batch.items()}

    def _part(self, name: str, array: np.ndarray) -> np.ndarray:
        each = -(-array.shape[1] // self.size)
        filler = IGNORE if name in TARGETS else 0
        filled = np.pad(array, [(0, 0), (0, each * self.size - array.shape[1])], constant_values=filler)
        return filled[:, self.index * each : (self.index + 1) * each]
