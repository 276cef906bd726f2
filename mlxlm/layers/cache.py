"""Key/value caches: what attention layers remember of the tokens before."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mlxlm.errors import UsageError


class KeyValueCache:
    """Keys and values of one self-attention layer, (B, Hkv, capacity, D), of which the first `length` are filled.

    Room grows in blocks, so a decoded token writes one slot and copies nothing else.
    """

    block = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0
        # How many of the first keys stand before all tokens: virtual ones, which no trimming forgets.
        self.virtual = 0
        # Keys and values of an encoder's output, projected once by a cross-attention layer.
        self.memory: tuple[mx.array, mx.array] | None = None

    def update(self, key: mx.array, value: mx.array) -> tuple[mx.array, mx.array]:
        """Append key and value, both (B, Hkv, L, D); returns all of them, (B, Hkv, length, D)."""
        start, end = self.length, self.length + key.shape[2]
        if self.keys is None or self.values is None or end > self.keys.shape[2]:
            self.keys = self._grow(self.keys, key, end)
            self.values = self._grow(self.values, value, end)
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grow(self, held: mx.array | None, new: mx.array, needed: int) -> mx.array:
        # A quarter more than needed keeps the copies of a long generation linear in its length.
        extra = needed // 4 if held is not None else 0
        capacity = -(-(needed + extra) // self.block) * self.block
        batch, heads, _, dim = new.shape
        if held is None or self.length == 0:
            return mx.zeros((batch, heads, capacity, dim), dtype=new.dtype)
        filled = held[:, :, : self.length]
        return mx.concatenate([filled, mx.zeros((batch, heads, capacity - self.length, dim), dtype=new.dtype)], axis=2)

    def begin(self, key: mx.array, value: mx.array) -> None:
        """Put keys and values (B, Hkv, v, D) before all tokens, unless they are there. They don't count as tokens."""
        if not self.length:
            self.update(key, value)
            self.virtual = self.length

    def trim(self, length: int) -> None:
        """Forget all tokens from position `length` on; virtual ones stay."""
        self.length = min(self.length, self.virtual + length)

    def take(self, rows: mx.array, *, memory: bool = True) -> None:
        """Row i becomes what row rows[i] was, as beam search needs it; there may be more rows than before.

        memory: also of what is kept of an encoder's output, default True.
        """
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]
        if memory and self.memory is not None:
            self.memory = self.memory[0][rows], self.memory[1][rows]

    def arrays(self) -> list[mx.array]:
        """What to evaluate between chunks of a prompt."""
        held = [] if self.keys is None or self.values is None else [self.keys, self.values]
        return held + list(self.memory or ())


class Cache:
    """The caches of all layers of a decoder, in order."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [KeyValueCache() for _ in range(num_layers)]

    def __getitem__(self, layer: int) -> KeyValueCache:
        return self.layers[layer]

    def __iter__(self) -> Iterator[KeyValueCache]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def length(self) -> int:
        """Tokens held, virtual ones not counted; the next token stands at this position, or as many later."""
        return self.layers[0].length - self.layers[0].virtual

    def begin(self, virtual: int) -> None:
        """Count the first `virtual` positions of every layer, which are being filled now, as no tokens."""
        for layer in self.layers:
            layer.virtual = virtual

    @property
    def nbytes(self) -> int:
        """Bytes held, free room included."""
        return sum(array.nbytes for array in self.arrays())

    def trim(self, length: int) -> None:
        """Forget all tokens from position `length` on. Raises UsageError when fewer are held."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} tokens can't be cut to {length}")
        for layer in self.layers:
            layer.trim(length)

    def take(self, rows: mx.array, *, memory: bool = True) -> None:
        """Row i becomes what row rows[i] was, in every layer.  rows (B,) int.  memory: see `KeyValueCache.take`."""
        for layer in self.layers:
            layer.take(rows, memory=memory)

    def arrays(self) -> list[mx.array]:
        """What to evaluate between chunks of a prompt."""
        return [array for layer in self.layers for array in layer.arrays()]
