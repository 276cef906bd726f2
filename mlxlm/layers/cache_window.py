"""A cache that forgets what is behind a window, and the choice of a cache for a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxlm.errors import UsageError
from mlxlm.kernels import AttentionMask
from mlxlm.layers.cache import Cache, KeyValueCache
from mlxlm.layers.cache_storage import FloatStorage, Parts, QuantizedStorage, Storage


class WindowCache(KeyValueCache):
    """A cache in which a query sees the last `window` keys, its own included, and the first `keep` of all.

    The first keys are attention sinks (Xiao et al. 2023, arXiv:2309.17453): with them a model goes on fluently after
    the beginning has been forgotten. They stay turned by their own positions; terms that depend on distances are not
    defined for them.

    What is held stays in order: new tokens go to the end, and once the room is used up the window moves to its start,
    one copy in `block` tokens. A decoding step so sees one contiguous range and needs no mask. A margin of `reserve`
    tokens behind the window is kept too, so that as many of the last ones can be taken back.
    """

    reserve_tokens = 64
    joins = False

    def __init__(self, window: int, keep: int = 0, storage: Storage | None = None) -> None:
        super().__init__(storage)
        if window < 1 or not 0 <= keep < self.reserve_tokens:
            raise UsageError(
                f"a window of {window} tokens with {keep} kept ones; valid are at least 1 and 0 to "
                f"{self.reserve_tokens - 1}"
            )
        self.window = window
        self.keep = keep
        self.sinks: tuple[Parts, Parts] | None = None

    def attend(
        self,
        query: mx.array,
        key: mx.array,
        value: mx.array,
        *,
        mask: AttentionMask,
        at: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        """See `KeyValueCache.attend`; the mask's own window is replaced. Rows must have one length."""
        if at is not None:
            raise UsageError("rows of different lengths need a cache made with CacheSpec(ragged=True)")
        if mask.prefix_lengths is not None:
            raise UsageError("prefix_lengths would keep what this cache forgets; use CacheSpec(ragged=True)")
        count, before = query.shape[2], self.keep - self.length
        if 0 < before < count and self.length + count > self.window:
            # The sinks themselves see each other as ever; whoever comes later sees all of them.
            halves = (slice(0, before), slice(before, count))
            return mx.concatenate(
                [
                    self.attend(query[:, :, part], key[:, :, part], value[:, :, part], mask=mask, **options)
                    for part in halves
                ],
                axis=2,
            )
        return super().attend(query, key, value, mask=self._mask(mask, count), **options)

    def _mask(self, mask: AttentionMask, count: int) -> AttentionMask:
        end = self.length + count
        if end <= max(self.window, self.keep):
            return mask
        if count == 1:
            return AttentionMask()  # all that it is shown
        if self.keep:
            return replace(mask, window=self.window, prefix_lengths=mx.array([self.keep]))
        return mask if mask.window == self.window else replace(mask, window=self.window)

    def append(self, key: mx.array, value: mx.array, at: mx.array | None = None) -> tuple[Parts, Parts, int]:
        """See `KeyValueCache.append`."""
        start, end = self.length, self.length + key.shape[2]
        new = self.storage.pack(key), self.storage.pack(value)
        seen = 0 if start < self.keep else max(0, start - (self.window - 1))
        self._make_room(new, end, max(self.first, seen - self.reserve_tokens))
        held = self._write(new, start - self.first)
        if self.keep and start < self.keep <= end:
            self._hold_sinks(held)
        lost = min(self.keep, seen) if self.keep else 0
        if lost:
            # Slots just behind the window hold what nobody sees any more: the sinks go there.
            held = self._write(
                tuple(tuple(a[:, :, :lost] for a in parts) for parts in self.sinks), seen - lost - self.first
            )
        self.length = end
        part = slice(seen - lost - self.first, end - self.first)
        keys, values = (tuple(a[:, :, part] for a in parts) for parts in held)
        return keys, values, seen - lost

    def _hold_sinks(self, held: tuple[Parts, Parts]) -> None:
        self.sinks = tuple(tuple(a[:, :, : self.keep] for a in parts) for parts in held)  # type: ignore[assignment]

    def adopt(self, row: mx.array) -> None:
        """See `KeyValueCache.adopt`."""
        super().adopt(row)
        if self.keep and self.length == self.keep and self.keys is not None and self.values is not None:
            self._hold_sinks((self.keys, self.values))

    def _write(self, new: Any, slot: int) -> tuple[Parts, Parts]:
        for held, parts in zip((self.keys, self.values), new, strict=True):
            for array, part in zip(held or (), parts, strict=True):
                array[:, :, slot : slot + part.shape[2]] = part
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _make_room(self, new: tuple[Parts, Parts], end: int, kept_from: int) -> None:
        """Room up to position `end`; what stands before kept_from may be forgotten."""
        if end - self.first <= self.capacity:
            return
        if not self.length:
            self.first = 0
            self.reserve(end, new)
            return
        kept = slice(kept_from - self.first, self.length - self.first)
        needed = end - kept_from
        # Short texts grow as others do; a full window has a block of free room, or a quarter of it.
        capacity = -(-(needed + max(self.block, needed // 4)) // self.block) * self.block
        free = capacity - (self.length - kept_from)
        for name in ("keys", "values"):
            parts = getattr(self, name)
            room = [mx.zeros((*a.shape[:2], free, a.shape[3]), dtype=a.dtype) for a in parts]
            moved = [mx.concatenate([a[:, :, kept], r], axis=2) for a, r in zip(parts, room, strict=True)]
            setattr(self, name, tuple(moved))
        self.first = kept_from

    @property
    def takes_back(self) -> int:
        """See `KeyValueCache.takes_back`."""
        return 0 if self.keep else self.reserve_tokens

    def can_trim(self, length: int) -> bool:
        """See `KeyValueCache.can_trim`."""
        end = self.virtual + length
        if end >= self.length or end == 0:
            return True
        seen = max(0, end - (self.window - 1))
        if self.keep and self.length > self.window:
            return False  # slots behind the window were given to the sinks
        return self.first <= seen

    def trim(self, length: int) -> None:
        """See `KeyValueCache.trim`."""
        super().trim(length)
        if not self.length:
            self.first, self.sinks = 0, None

    def take(self, rows: mx.array, *, memory: bool = True) -> None:
        """See `KeyValueCache.take`."""
        super().take(rows, memory=memory)
        if self.sinks is not None:
            self.sinks = tuple(tuple(a[rows] for a in parts) for parts in self.sinks)  # type: ignore[assignment]

    def arrays(self) -> list[mx.array]:
        """See `KeyValueCache.arrays`."""
        return super().arrays() + [array for parts in self.sinks or () for array in parts]

    def filled(self) -> tuple[Parts, Parts]:
        """See `KeyValueCache.filled`: the sinks first, where there are any beside the rest."""
        if self.keys is None or self.values is None:
            raise UsageError("the cache is empty")
        kept = slice(self._start(self.length) - self.first, self.length - self.first)
        recent = tuple(tuple(a[:, :, kept] for a in parts) for parts in (self.keys, self.values))
        if self.sinks is None:
            return recent  # type: ignore[return-value]
        pairs = zip(self.sinks, recent, strict=True)
        return tuple(  # type: ignore[return-value]
            tuple(mx.concatenate([sink, a], axis=2) for sink, a in zip(sinks, parts, strict=True))
            for sinks, parts in pairs
        )

    def _start(self, length: int) -> int:
        """First position that a file holds of so many: the window and a margin, or the window alone with sinks."""
        margin = 0 if self.keep else self.reserve_tokens
        return max(0, length - (self.window - 1) - margin)

    def fill(self, keys: Parts, values: Parts, length: int, virtual: int) -> None:
        """See `KeyValueCache.fill`."""
        self.first = self._start(length)
        sinks = self.keep if length >= self.keep else 0
        if sinks:
            self.sinks = tuple(tuple(a[:, :, :sinks] for a in parts) for parts in (keys, values))  # type: ignore
        if self.keep and self.first:
            # Free slots before the window, where the sinks are put.
            self.first -= self.keep
            super().fill(keys, values, length, virtual)
        else:
            rest = (tuple(a[:, :, sinks:] for a in parts) for parts in (keys, values))
            super().fill(*rest, length, virtual)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Which cache a decoder has. The default keeps exactly what its layers can see, as it is.

    bits: 8 or 4 quantizes keys and values, default no. Answers then change a little: on a text, SmolLM2-135M found
    another likeliest token at 0.4% of the places with 8 bits, at 20% with 4 (perplexity 44.88, 44.90, 52.87).
    group_size: of quantized values, 32, 64 or 128.
    max_length: tokens that a layer sees at most: the first `keep` and the last ones; this changes the answers to longer
    texts. Default no limit.  keep: default 4; none in layers whose scores depend on distances, which a token that stays
    would change from step to step.
    ragged: rows may have different lengths; layers with a window then hold what is behind it too, default False.
    """

    bits: int | None = None
    group_size: int = 64
    max_length: int | None = None
    keep: int = 4
    ragged: bool = False

    def __post_init__(self) -> None:
        self.storage  # noqa: B018  raises for bad numbers
        if self.max_length is not None:
            if self.ragged:
                raise UsageError("a cache of bounded length has rows of one length: it can't be ragged")
            if self.max_length <= self.keep:
                raise UsageError(f"a cache of {self.max_length} tokens has no room beside the {self.keep} it keeps")

    @property
    def storage(self) -> Storage:
        """How keys and values are held."""
        return FloatStorage() if self.bits is None else QuantizedStorage(self.bits, self.group_size)

    def build(self, windows: Sequence[int | None], distances: bool = False) -> Cache:
        """An empty cache for layers with these windows, None for those that see everything.

        distances: whether the scores depend on how far a key is away, default False.
        """
        return Cache([self._layer(window, distances) for window in windows])

    def _layer(self, window: int | None, distances: bool = False) -> KeyValueCache:
        if self.ragged:
            return KeyValueCache(self.storage)
        if self.max_length is not None and (window is None or window > self.max_length):
            keep = 0 if distances else self.keep
            return WindowCache(self.max_length - keep, keep, self.storage)
        return KeyValueCache(self.storage) if window is None else WindowCache(window, 0, self.storage)

    def held(self, window: int | None, length: int) -> int:
        """Slots that a layer with this window needs for a text of `length` tokens, at most."""
        layer = self._layer(window)
        if isinstance(layer, WindowCache):
            length = min(length, layer.window + layer.reserve_tokens + max(layer.block, layer.window // 4))
        return -(-length // layer.block) * layer.block
