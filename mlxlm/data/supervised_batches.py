"""Batches of supervised examples: padded ones of like length, or several examples in a row with a document mask."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxlm.data.batch import IGNORE, Batch
from mlxlm.data.supervised import Example
from mlxlm.errors import DataError, UsageError

_POOL = 32  # batches whose examples are sorted by length together


class SupervisedSource:
    """Batches of all examples, each exactly once an epoch, the last partial batch included. A `BatchSource`.

    examples: from `encode_rows`.  batch_size: rows of a batch.  epochs: None for endless.  shuffle: anew each epoch;
    otherwise in order.  packing: rows of `max_length` tokens that hold several examples, which don't see each other;
    for word targets of a single stack.  decoder_start: of a model with encoder and decoder.  seed: of the order.
    multiple: padded lengths are multiples of it, which bounds the shapes that steps are compiled for; default 32.

    The order depends on seed and epoch alone, so `state` is a few numbers and `restore` exact.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        max_length: int,
        epochs: int | None = None,
        shuffle: bool = True,
        packing: bool = False,
        decoder_start: int | None = None,
        seed: int = 0,
        multiple: int = 32,
    ):
        if not examples:
            raise DataError("there are no examples to make batches of")
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, expected at least 1")
        if packing and any(example.target is not None or example.label is not None for example in examples):
            raise UsageError("packing is for word targets of decoders; labels and source-target pairs are padded")
        if decoder_start is None and any(example.target is not None for example in examples):
            raise UsageError("examples with a target of their own need the decoder_start of an encoder-decoder model")
        self.examples, self.batch_size, self.max_length, self.epochs = examples, batch_size, max_length, epochs
        self.shuffle, self.packing, self.decoder_start = shuffle, packing, decoder_start
        self.seed, self.multiple = seed, multiple
        self.epoch, self.num_tokens, self._index = 0, 0, 0
        self._plan: tuple[int, list[list[list[int]]]] | None = None
        self._contents = _digest(examples)

    def __len__(self) -> int:
        """Batches of the current epoch."""
        return len(self._batches())

    def num_batches(self, epochs: int) -> int:
        """Batches of the first epochs together. Packed rows depend on the order, so epochs may differ in number."""
        if not self.packing:
            return epochs * -(-len(self.examples) // self.batch_size)
        return sum(len(self._arrange(epoch)) for epoch in range(epochs))

    def next(self) -> Batch | None:
        """The next batch, None after the last epoch."""
        if self.epochs is not None and self.epoch >= self.epochs:
            return None
        batches = self._batches()
        rows = [[self.examples[i] for i in row] for row in batches[self._index]]
        self._index += 1
        if self._index == len(batches):
            self.epoch, self._index = self.epoch + 1, 0
        self.num_tokens += sum(len(example.tokens) for row in rows for example in row)
        if self.packing:
            return pack_examples(rows, self.max_length)
        return self.batch([row[0] for row in rows])

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The batch of some examples, one a row; kinds of examples that have batches of their own do it otherwise."""
        return pad_examples(examples, self.max_length, self.multiple, self.decoder_start)

    def state(self) -> dict[str, Any]:
        """Where the source stands, for `restore`."""
        return {
            "epoch": self.epoch, "index": self._index, "num_tokens": self.num_tokens, "data": self._fingerprint()
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises DataError when the data or its batching is another one."""
        if state["data"] != self._fingerprint():
            raise DataError(
                "the checkpoint was made with other data or other batches "
                f"({state['data']}, now {self._fingerprint()}), so it can't be continued exactly"
            )
        self.epoch, self._index, self.num_tokens = state["epoch"], state["index"], state["num_tokens"]

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "examples": len(self.examples),
            "contents": self._contents,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "packing": self.packing,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def _batches(self) -> list[list[list[int]]]:
        """Batches of this epoch: of rows of numbers of examples."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, self._arrange(self.epoch))
        return self._plan[1]

    def _arrange(self, epoch: int) -> list[list[list[int]]]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.examples)) if self.shuffle else np.arange(len(self.examples))
        size = self.batch_size
        if self.packing:
            rows = _first_fit(order.tolist(), [len(example.tokens) - 1 for example in self.examples], self.max_length)
            return [rows[at : at + size] for at in range(0, len(rows), size)]
        if not self.shuffle:
            return [[[int(i)] for i in order[at : at + size]] for at in range(0, len(order), size)]
        batches = []
        for first in range(0, len(order), size * _POOL):
            pool = sorted(order[first : first + size * _POOL].tolist(), key=lambda i: _length(self.examples[i]))
            batches += [[[i] for i in pool[at : at + size]] for at in range(0, len(pool), size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def _digest(examples: Sequence[Example]) -> str:
    """A hash of all that is trained on, in its order; where a row stood does not count."""
    hashed = hashlib.blake2b(digest_size=16)
    for example in examples:
        label = example.label if isinstance(example.label, list) else [] if example.label is None else [example.label]
        parts = (example.tokens, example.scored, example.target or (), label, example.types or ())
        hashed.update(np.array([len(part) for part in parts], dtype=np.int32).tobytes())
        for part in parts:
            hashed.update(np.array(part, dtype=np.int32).tobytes())
    return hashed.hexdigest()


def _length(example: Example) -> int:
    return max(len(example.tokens), len(example.target or ()))


def _first_fit(order: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    """Examples in rows of at most `room` places: each goes to the first of the last rows where it fits."""
    rows: list[list[int]] = []
    left: list[int] = []
    for i in order:
        near = range(max(0, len(rows) - 64), len(rows))
        at = next((row for row in near if left[row] >= lengths[i]), None)
        if at is None:
            rows.append([])
            left.append(room)
            at = len(rows) - 1
        rows[at].append(i)
        left[at] -= lengths[i]
    return rows


def padded_length(length: int, limit: int, multiple: int) -> int:
    """A length rounded up to `multiple`, which doubles with the length from 16 times that on; at most limit."""
    step = multiple
    while step * 16 <= length:
        step *= 2
    return max(min(-(-length // step) * step, limit), length)


def shifted_targets(example: Example) -> list[int]:
    """For each place but the last the next token where it is to be learned, else -100."""
    pairs = zip(example.tokens[1:], example.scored[1:], strict=True)
    return [token if scored else IGNORE for token, scored in pairs]


def pad_examples(
    examples: Sequence[Example], max_length: int, multiple: int = 32, decoder_start: int | None = None
) -> Batch:
    """A batch with one example a row, padded on the right with token 0, which no target and no key is.

    Words: tokens (B, L), targets (B, L) already shifted, key_lengths (B,). Encoder-decoder: decoder_tokens and targets
    (B, T). Labels: labels (B,) or (B, L) of tokens.
    """
    words = examples[0].target is None and examples[0].label is None
    inputs = [example.tokens[:-1] if words else example.tokens for example in examples]
    length = padded_length(max(map(len, inputs)), max_length, multiple)
    batch: Batch = {
        "tokens": _table(inputs, length, 0),
        "key_lengths": np.array([len(row) for row in inputs], dtype=np.int32),
    }
    if words:
        batch["targets"] = _table([shifted_targets(example) for example in examples], length, IGNORE)
        return batch
    if any(example.types is not None for example in examples):
        batch["token_types"] = _table([example.types or [0] * len(example.tokens) for example in examples], length, 0)
    if examples[0].target is not None:
        targets = [example.target or [] for example in examples]
        width = padded_length(max(map(len, targets)), max_length, multiple)
        batch["targets"] = _table(targets, width, IGNORE)
        batch["decoder_tokens"] = _table([[decoder_start, *target[:-1]] for target in targets], width, 0)
    elif isinstance(examples[0].label, list):
        batch["labels"] = _table([example.label for example in examples], length, IGNORE)
    else:
        batch["labels"] = np.array([example.label for example in examples], dtype=np.int32)
    return batch


def pack_examples(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """A batch of rows of several examples: tokens, targets, positions from 0 in each, segments 1, 2, ... (0: padding).

    No target crosses from one example to the next.
    """
    tokens, targets, positions, segments = [], [], [], []
    for row in rows:
        tokens.append([token for example in row for token in example.tokens[:-1]])
        targets.append([target for example in row for target in shifted_targets(example)])
        positions.append([place for example in row for place in range(len(example.tokens) - 1)])
        segments.append([number for number, example in enumerate(row, 1) for _ in example.tokens[:-1]])
    return {
        "tokens": _table(tokens, length, 0),
        "targets": _table(targets, length, IGNORE),
        "positions": _table(positions, length, 0),
        "segments": _table(segments, length, 0),
    }


def _table(rows: Sequence[Any], length: int, padding: int) -> np.ndarray:
    table = np.full((len(rows), length), padding, dtype=np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table
