"""Batches from tokenised stores, with a position that is a few whole numbers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mlxlm.data.batch import IGNORE, TARGETS, Batch, RowObjective
from mlxlm.data.mixture import Mixture
from mlxlm.data.rows import PackedRows, Rows, SingleRows, num_rows
from mlxlm.data.store import TokenStore
from mlxlm.errors import DataError, UsageError

_WINDOW = 64  # batches whose rows are sorted by length together


class TokenReader:
    """A `BatchSource` over a store or a mixture: rows of documents, made into batches by an objective.

    Every document is used exactly once an epoch (for mixtures see `Mixture`), the last, smaller batch included. With
    an objective that packs, rows are filled without a gap; otherwise a row is one piece, and pieces of similar length
    share a batch. Any batch follows from (seed, epoch, number) alone, so that a restored reader goes on exactly.

    Ranks read disjoint rows and have equally many batches. Where the last rows are fewer than the ranks, a rank
    without one gets another's row with no targets, so that it can take the step with all others.

    Attributes:
        epoch: finished passes.  num_tokens: tokens of documents that this rank has handed out.
        batches_per_epoch: batches of a pass, the same in every epoch and on every rank.
    """

    def __init__(
        self,
        data: TokenStore | Mixture,
        objective: RowObjective,
        *,
        batch_size: int,
        max_length: int,
        seed: int = 0,
        epochs: int | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """batch_size: rows of a batch, of one rank.  max_length: columns of a batch at most.  epochs: passes before
        the end, None for endless.  shuffle: another order each epoch, by the seed; False keeps that of the sources.
        """
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 1), ("seed", seed, 0)):
            if value < least:
                raise UsageError(f"{name} {value}; expected {least} or more")
        if epochs is not None and epochs < 1:
            raise UsageError(f"epochs {epochs}; expected 1 or more, or none for endless reading")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}; expected 0 <= rank < world_size")
        self._stores = data.stores if isinstance(data, Mixture) else (data,)
        self._objective, self._batch_size, self._max_length = objective, batch_size, max_length
        self._seed, self._epochs, self._shuffle = seed, epochs, shuffle
        self._rank, self._world = rank, world_size
        self._length = objective.row_length(max_length)
        if self._length < 1:
            raise UsageError(f"max_length {max_length} is too short for this objective: no token fits in a row")
        self._own = [num_rows(store, self._length, objective.packs) for store in self._stores]
        if not all(self._own):
            raise DataError("the data has no documents, so there are no batches to read")
        self._shares = data.rows(self._own) if isinstance(data, Mixture) else np.array(self._own)
        self.num_rows = int(self._shares.sum())
        self._step = batch_size * world_size
        self.batches_per_epoch = -(-self.num_rows // self._step)
        # A mixture may need the passes before and after of each store at once.
        self._pass = functools.lru_cache(maxsize=2 * len(self._stores))(self._make_pass)
        self._plan = functools.lru_cache(maxsize=1)(self._make_plan)
        self.epoch, self._batch, self.num_tokens = 0, 0, 0

    def next(self) -> Batch | None:
        """The next batch; None after the last of `epochs` passes."""
        if self._epochs is not None and self.epoch >= self._epochs:
            return None
        rows, mine = self._rows(self.epoch, self._batch)
        rng = np.random.default_rng([self._seed, self.epoch, self._batch, self._rank, 2])
        batch = self._objective.batch(rows, rng, self._max_length)
        if mine:
            self.num_tokens += sum(len(piece) for row in rows for piece in row)
        else:
            batch = {key: np.full_like(value, IGNORE) if key in TARGETS else value for key, value in batch.items()}
        self._batch += 1
        if self._batch == self.batches_per_epoch:
            self.epoch, self._batch = self.epoch + 1, 0
        return batch

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"epoch": self.epoch, "batch": self._batch, "num_tokens": self.num_tokens, "reader": self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position. Raises DataError when it belongs to other data or settings, naming what differs."""
        try:
            epoch, batch, count, identity = (state[key] for key in ("epoch", "batch", "num_tokens", "reader"))
        except (KeyError, TypeError):
            raise DataError("not the state of a token reader; expected epoch, batch, num_tokens and reader") from None
        here = self._identity()
        if isinstance(identity, dict) and identity.get("documents") != here["documents"]:
            raise DataError(
                "the documents are not those that this run began with, or not in the same order: put the old data "
                "back, or start a new run in another folder"
            )
        other = [f"{key} was {identity.get(key)!r}, is {here[key]!r}" for key in here if identity.get(key) != here[key]]
        if other:
            raise DataError(f"the reader's state belongs to another run: {'; '.join(other)}")
        if not (epoch >= 0 and 0 <= batch < self.batches_per_epoch):
            raise DataError(f"the reader's state has batch {batch} of {self.batches_per_epoch} in epoch {epoch}")
        self.epoch, self._batch, self.num_tokens = int(epoch), int(batch), int(count)

    def _identity(self) -> dict[str, Any]:
        return {
            "batch_size": self._batch_size, "max_length": self._max_length, "row_length": self._length,
            "packs": bool(self._objective.packs), "seed": self._seed, "shuffle": self._shuffle, "rank": self._rank,
            "world_size": self._world, "rows": [int(share) for share in self._shares], "documents": self._fingerprints,
        }  # fmt: skip

    @functools.cached_property
    def _fingerprints(self) -> list[str]:
        return [store.fingerprint for store in self._stores]

    def _make_pass(self, store: int, number: int) -> Rows:
        kind = PackedRows if self._objective.packs else SingleRows
        # Each store has an order of its own, also where two stores are equally long.
        return kind(self._stores[store], self._length, self._seed + 7919 * store, number, self._shuffle)

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row of an epoch its store and its place in that store's endless sequence, in reading order; and
        the order of the batches."""
        stores = np.repeat(np.arange(len(self._shares)), self._shares)
        inside = np.arange(self.num_rows) - np.repeat(np.cumsum(self._shares) - self._shares, self._shares)
        places = inside + epoch * self._shares[stores]
        rng = np.random.default_rng([self._seed, epoch, 3])
        if len(self._shares) > 1:
            # Evenly interleaved in the given order, or by chance; the rows of a store keep their order.
            order = rng.permutation(self.num_rows) if self._shuffle else np.argsort(
                (inside + 0.5) / self._shares[stores], kind="stable"
            )  # fmt: skip
            stores, places = stores[order], places[order]
        batches = np.arange(self.batches_per_epoch)
        if not self._objective.packs and self._shuffle:
            by_length = self._by_length(stores, places)
            stores, places = stores[by_length], places[by_length]
            # The last batch may be smaller and stays last.
            batches[:-1] = rng.permutation(self.batches_per_epoch - 1)
        return stores, places, batches

    def _by_length(self, stores: np.ndarray, places: np.ndarray) -> np.ndarray:
        """An order in which rows of a similar length are together, within windows of many batches."""
        lengths = np.empty(len(stores), dtype=np.int64)
        for store, count in enumerate(self._own):
            here = np.flatnonzero(stores == store)
            for number in np.unique(places[here] // count):
                of_pass = here[places[here] // count == number]
                lengths[of_pass] = self._pass(store, int(number)).lengths[places[of_pass] % count]
        window = np.arange(len(stores)) // (_WINDOW * self._step)
        return np.lexsort((lengths, window))

    def _rows(self, epoch: int, number: int) -> tuple[list[list[np.ndarray]], bool]:
        """The rows of this rank's batch, and whether they are its own."""
        stores, places, batches = self._plan(epoch)
        first = int(batches[number]) * self._step
        everyone = range(first, min(first + self._step, self.num_rows))
        mine = everyone[self._rank :: self._world]
        chosen = mine or everyone[-1:]
        return [self._row(int(stores[index]), int(places[index])) for index in chosen], bool(mine)

    def _row(self, store: int, place: int) -> list[np.ndarray]:
        number, row = divmod(place, self._own[store])
        return self._pass(store, number).row(row)
