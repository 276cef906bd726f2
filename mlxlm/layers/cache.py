"""Key/value caches: what attention layers remember of the tokens before.

A `Cache` is a list of `KeyValueCache`, one a layer; attention layers know only `begin`, `attend` and `memory` of it.
How much of the past a layer keeps is the kind of its cache (`WindowCache` forgets), how it is held is its storage
(`cache_storage`). `CacheSpec` chooses both for a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlxlm.errors import UsageError
from mlxlm.kernels import AttentionMask
from mlxlm.layers.cache_storage import FloatStorage, Parts, Storage, Terms


def _no_terms(query_length: int, key_length: int, dropped: int) -> dict[str, Any]:
    return {}


class KeyValueCache:
    """Keys and values of one self-attention layer, (B, Hkv, capacity, D), of which the first `length` are filled.

    Room grows in blocks, so a decoded token writes one slot and copies nothing else. New tokens go to the end, or where
    an array says: one place for all rows keeps the shapes of a decoding step the same until the room is used up, one
    place a row serves rows of different lengths.
    """

    block = 256
    # Whether rows of different lengths can stand side by side.
    joins = True

    def __init__(self, storage: Storage | None = None) -> None:
        self.storage: Storage = FloatStorage() if storage is None else storage
        self.keys: Parts | None = None
        self.values: Parts | None = None
        self.length = 0
        # Position of the key in the first slot; caches that forget move on.
        self.first = 0
        # Slots that will ever be needed, where somebody knows; growing doesn't go beyond.
        self.most: int | None = None
        # How many of the first keys stand before all tokens: virtual ones, which no trimming forgets.
        self.virtual = 0
        # Keys and values of an encoder's output, projected once by a cross-attention layer.
        self.memory: tuple[mx.array, mx.array] | None = None

    def attend(
        self,
        query: mx.array,
        key: mx.array,
        value: mx.array,
        *,
        mask: AttentionMask,
        at: mx.array | None = None,
        terms: Terms = _no_terms,
        **options: Any,
    ) -> mx.array:
        """Append key and value, both (B, Hkv, L, D), and let query (B, H, L, D) attend to all that is held.

        mask: of the layer; with `at` its query_offset is that array.  at: () or (B,) int32, the slot of the first of
        these tokens, default behind those held.  terms: what is added to the scores, see `Terms`.
        options: further keywords of `attention`.
        """
        keys, values, dropped = self.append(key, value, at)
        given = terms(query.shape[2], keys[0].shape[2], dropped)
        return self.storage.attend(query, keys, values, mask=mask, dim=value.shape[3], **given, **options)

    def append(self, key: mx.array, value: mx.array, at: mx.array | None = None) -> tuple[Parts, Parts, int]:
        """Append; returns what the new tokens may see of keys and values, and how many older ones come before that.

        With `at` all slots in use come back, also those that hold nothing yet in some rows.
        """
        start, end = self.length, self.length + key.shape[2]
        new = self.storage.pack(key), self.storage.pack(value)
        self.reserve(end, new)
        assert self.keys is not None
        assert self.values is not None
        self.keys = _written(self.keys, new[0], start if at is None else at)
        self.values = _written(self.values, new[1], start if at is None else at)
        self.length = end
        if end == self.capacity:
            return self.keys, self.values, 0
        return tuple(a[:, :, :end] for a in self.keys), tuple(a[:, :, :end] for a in self.values), 0

    def update(self, key: mx.array, value: mx.array) -> tuple[mx.array, mx.array]:
        """Append key and value, both (B, Hkv, L, D); returns all that they may see, as plain arrays."""
        keys, values, _ = self.append(key, value)
        return (
            self.storage.unpack(keys, key.dtype, key.shape[3]),
            self.storage.unpack(values, value.dtype, value.shape[3]),
        )

    @property
    def capacity(self) -> int:
        """Slots there are."""
        return 0 if self.keys is None else self.keys[0].shape[2]

    def reserve(self, needed: int, like: tuple[Parts, Parts] | None = None) -> None:
        """Make room for `needed` slots in all.  like: parts of new keys and values, needed while nothing is held."""
        if needed <= self.capacity:
            return
        # A quarter more than needed keeps the copies of a long generation linear in its length.
        extra = needed // 4 if self.keys is not None else 0
        wanted = needed + extra
        if self.most is not None:
            wanted = max(needed, min(wanted, self.most))
        capacity = -(-wanted // self.block) * self.block
        if self.keys is None or self.values is None or not self.length:
            like = like or (self.keys, self.values)  # type: ignore[assignment]
            self.keys, self.values = (tuple(_room(a, capacity) for a in parts) for parts in like)
        else:
            self.keys = tuple(_longer(a, self.length, capacity) for a in self.keys)
            self.values = tuple(_longer(a, self.length, capacity) for a in self.values)

    def begin(self, key: mx.array, value: mx.array) -> None:
        """Put keys and values (B, Hkv, v, D) before all tokens, unless they are there. They don't count as tokens."""
        if not self.length:
            self.append(key, value)
            self.virtual = self.length

    @property
    def takes_back(self) -> int:
        """How many of the last tokens can be forgotten at any time."""
        return 2**31

    def can_trim(self, length: int) -> bool:
        """Whether `trim(length)` would leave what the next token sees; to nothing is always possible."""
        return True

    def trim(self, length: int) -> None:
        """Forget all tokens from position `length` on; virtual ones stay."""
        self.length = min(self.length, self.virtual + length)

    def take(self, rows: mx.array, *, memory: bool = True) -> None:
        """Row i becomes what row rows[i] was, as beam search needs it; there may be more rows than before.

        memory: also of what is kept of an encoder's output, default True.
        """
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (tuple(a[rows] for a in parts) for parts in (self.keys, self.values))
        if memory and self.memory is not None:
            self.memory = self.memory[0][rows], self.memory[1][rows]

    def adopt(self, row: mx.array) -> None:
        """All rows take over the last token of one.  row () int."""
        slot = self.length - self.first - 1
        for array in (*(self.keys or ()), *(self.values or ())):
            array[:, :, slot] = array[row, :, slot]

    def join(self, others: Sequence[KeyValueCache]) -> None:
        """Append the rows of other caches of this kind and storage, each at least one token long."""
        caches = [cache for cache in (self, *others) if cache.keys is not None]
        longest = max(cache.length for cache in caches)
        capacity = -(-(longest + 1) // self.block) * self.block
        for name in ("keys", "values"):
            parts = [[_fitted(a, cache.length, capacity) for a in getattr(cache, name)] for cache in caches]
            setattr(self, name, tuple(mx.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        self.length = longest

    def arrays(self) -> list[mx.array]:
        """What to evaluate between chunks of a prompt."""
        return [*(self.keys or ()), *(self.values or ()), *(self.memory or ())]

    def filled(self) -> tuple[Parts, Parts]:
        """Keys and values without the free room, for a file. Raises UsageError when nothing is held."""
        if self.keys is None or self.values is None:
            raise UsageError("the cache is empty")
        return tuple(a[:, :, : self.length] for a in self.keys), tuple(a[:, :, : self.length] for a in self.values)

    def fill(self, keys: Parts, values: Parts, length: int, virtual: int) -> None:
        """Hold what `filled` gave.  length, virtual: of the cache then."""
        self.keys, self.values, self.length, self.virtual = keys, values, length, virtual


def _room(like: mx.array, capacity: int) -> mx.array:
    return mx.zeros((*like.shape[:2], capacity, like.shape[3]), dtype=like.dtype)


def _longer(held: mx.array, length: int, capacity: int) -> mx.array:
    return mx.concatenate([held[:, :, :length], _room(held, capacity - length)], axis=2)


def _fitted(held: mx.array, length: int, capacity: int) -> mx.array:
    return held[:, :, :capacity] if held.shape[2] >= capacity else _longer(held, length, capacity)


def _written(held: Parts, new: Parts, at: int | mx.array) -> Parts:
    """The held arrays with new ones (B, Hkv, L, ...) in the slots from `at` on: an int, or an array () or (B,)."""
    if isinstance(at, int):
        for array, part in zip(held, new, strict=True):
            array[:, :, at : at + part.shape[2]] = part
        return held
    if at.ndim == 0 and new[0].shape[2] == 1:
        at = at.reshape(1)  # one kernel on GPUs; a slice at a place that is not known takes two
    if at.ndim == 0:
        return tuple(
            mx.slice_update(array, part, at.reshape(1), axes=(2,)) for array, part in zip(held, new, strict=True)
        )
    count = new[0].shape[2]
    slots = at[:, None] if count == 1 else at[:, None] + mx.arange(count, dtype=at.dtype)
    slots = slots[:, None, :, None]
    return tuple(
        mx.put_along_axis(array, mx.broadcast_to(slots, part.shape), part, axis=2)
        for array, part in zip(held, new, strict=True)
    )


class Cache:
    """The caches of all layers of a decoder, in order.

    Its rows have one length until a pass is told otherwise (`key_lengths`) or caches of other lengths join it; then
    each row has its own.
    """

    def __init__(self, layers: int | Sequence[KeyValueCache]) -> None:
        self.layers = [KeyValueCache() for _ in range(layers)] if isinstance(layers, int) else list(layers)
        # Tokens of each row, virtual ones not counted, while they differ; and the array of them, made when asked for.
        self.lengths: list[int] | None = None
        self._offset: mx.array | None = None
        # Where the next pass writes, when a compiled step keeps that on the device.
        self.place: mx.array | None = None

    def __getitem__(self, layer: int) -> KeyValueCache:
        return self.layers[layer]

    def __iter__(self) -> Iterator[KeyValueCache]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def length(self) -> int:
        """Tokens held, virtual ones not counted, of the longest row; its next token stands there, or later."""
        return self.layers[0].length - self.layers[0].virtual

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: an int, or an array where the rows differ or it is kept on the device."""
        if self.place is not None:
            return self.place
        if self.lengths is None:
            return self.length
        if self._offset is None:
            self._offset = mx.array(self.lengths, dtype=mx.int32)
        return self._offset

    @property
    def slots(self) -> mx.array | None:
        """Where the next token of each row is written, None for behind those held. See `KeyValueCache.attend`."""
        if self.place is None and self.lengths is None:
            return None
        virtual = self.layers[0].virtual
        return self.offset + virtual if virtual else self.offset  # type: ignore[return-value]

    def begin(self, virtual: int) -> None:
        """Count the first `virtual` positions of every layer, which are being filled now, as no tokens."""
        for layer in self.layers:
            layer.virtual = virtual

    def advance(self, num_tokens: int, counts: Sequence[int] | None = None) -> None:
        """A pass over `num_tokens` is over, of which row i had counts[i], default all of them."""
        if self.lengths is None and counts is None:
            return
        if self.lengths is None:
            self.lengths = [self.length - num_tokens] * len(counts or ())
        self._set(
            [n + count for n, count in zip(self.lengths, counts or [num_tokens] * len(self.lengths), strict=True)]
        )

    def _set(self, lengths: list[int]) -> None:
        for layer in self.layers:
            layer.length = max(lengths) + layer.virtual
        self.lengths, self._offset = None if len(set(lengths)) == 1 else lengths, None

    def bound(self, tokens: int) -> None:
        """Don't make room for more than so many tokens a row as long as they are enough."""
        for layer in self.layers:
            layer.most = tokens + layer.virtual

    @property
    def nbytes(self) -> int:
        """Bytes held, free room included."""
        return sum(array.nbytes for array in self.arrays())

    @property
    def takes_back(self) -> int:
        """How many of the last tokens can be forgotten at any time."""
        return min(layer.takes_back for layer in self.layers)

    def can_trim(self, length: int) -> bool:
        """Whether `trim(length)` can be done: some layers forget what is far behind. To 0 is always possible."""
        return 0 <= length <= self.length and all(layer.can_trim(length) for layer in self.layers)

    def trim(self, length: int) -> None:
        """Forget all tokens from position `length` on. Raises UsageError when that can't be done, see `can_trim`."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} tokens can't be cut to {length}")
        if not self.can_trim(length):
            raise UsageError(
                f"a cache of {self.length} tokens can't be cut to {length}: its window has moved on; cut it to 0"
            )
        for layer in self.layers:
            layer.trim(length)
        if self.lengths is not None:
            self._set([min(n, length) for n in self.lengths])

    def take(self, rows: mx.array | Sequence[int], *, memory: bool = True) -> None:
        """Row i becomes what row rows[i] was, in every layer.  rows (B,) int.  memory: see `KeyValueCache.take`."""
        chosen = rows if isinstance(rows, mx.array) else mx.array(list(rows))
        for layer in self.layers:
            layer.take(chosen, memory=memory)
        if self.lengths is not None:
            order = rows.tolist() if isinstance(rows, mx.array) else rows
            self._set([self.lengths[row] for row in order])

    def adopt(self, row: mx.array) -> None:
        """Rows that differ in their last token alone become row `row`, () int, without copying what they share.

        Raises UsageError for rows of different lengths.
        """
        if self.lengths is not None:
            raise UsageError("rows of different lengths differ in more than their last token")
        for layer in self.layers:
            layer.adopt(row)

    def join(self, others: Sequence[Cache]) -> None:
        """Append the rows of other caches, in order, each of any length; an empty cache becomes theirs.

        Raises UsageError for layers that forget: their rows must have one length (`CacheSpec.ragged` has none).
        """
        caches = [cache for cache in (self, *others) if cache.length]
        if any(not layer.joins for cache in caches for layer in cache):
            raise UsageError("rows of windowed caches can't be joined; make them with CacheSpec(ragged=True)")
        lengths = [n for cache in caches for n in cache.row_lengths]
        virtual = caches[0][0].virtual
        for index, layer in enumerate(self.layers):
            layer.join([cache[index] for cache in others if cache.length])
            layer.virtual = virtual
        self._set(lengths)

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row, virtual ones not counted; no rows when nothing is held."""
        if self.lengths is not None:
            return list(self.lengths)
        keys = self.layers[0].keys
        return [self.length] * (0 if keys is None else keys[0].shape[0])

    def arrays(self) -> list[mx.array]:
        """What to evaluate between chunks of a prompt."""
        return [array for layer in self.layers for array in layer.arrays()]
