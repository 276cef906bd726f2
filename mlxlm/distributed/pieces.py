"""Pieces: which part of a whole array a rank holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx


def share(total: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of part `index` when `total` things are shared by `parts`: as evenly as can be, larger first."""
    size, rest = divmod(total, parts)
    start = index * size + min(index, rest)
    return start, start + size + (index < rest)


def own_memory(array: mx.array) -> mx.array:
    """A computed copy of an array that may be a view of a larger one, which can then be let go."""
    copy = array * mx.array(1, dtype=array.dtype)
    mx.eval(copy)
    return copy


@dataclass(frozen=True)
class Piece:
    """A box of an array.  shape: of the whole array.  start, stop: of the box, by axis."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Piece:
        """All of it."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of the box."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def count(self) -> int:
        """Values in the box."""
        return prod(self.size)

    @property
    def is_whole(self) -> bool:
        """Whether the box is all there is."""
        return self.size == self.shape

    def within(self, axis: int, start: int, stop: int) -> Piece:
        """A part of this box: from start to stop along an axis, counted from the box's own beginning."""
        first, last = list(self.start), list(self.stop)
        last[axis] = min(first[axis] + stop, self.stop[axis])
        first[axis] = min(first[axis] + start, self.stop[axis])
        return replace(self, start=tuple(first), stop=tuple(last))

    def common(self, other: Piece) -> Piece | None:
        """What two boxes of one array have in common, None when it is nothing."""
        start = tuple(map(max, zip(self.start, other.start, strict=True)))
        stop = tuple(map(min, zip(self.stop, other.stop, strict=True)))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return replace(self, start=start, stop=stop)

    def cut(self, array: mx.array, held: Piece | None = None) -> mx.array:
        """The box out of the whole array, or out of the array of a larger box that holds it."""
        base = (0,) * len(self.shape) if held is None else held.start
        if self.size == array.shape:
            return array
        return array[self.slices(base)]

    def taken(self, array: mx.array) -> mx.array:
        """`cut` out of the whole array, computed now and in memory of its own: a mere slice would keep the whole."""
        return own_memory(self.cut(array))

    def paste(self, array: mx.array) -> mx.array:
        """The whole array, with zeros everywhere but in the box."""
        if self.is_whole:
            return array
        return mx.pad(array, list(zip(self.start, (n - s for n, s in zip(self.shape, self.stop, strict=True)),
                                      strict=True)))  # fmt: skip

    def slices(self, base: tuple[int, ...]) -> tuple[slice, ...]:
        """The box as an index into an array whose first element is the whole array's element `base`."""
        return tuple(slice(a - b, c - b) for a, c, b in zip(self.start, self.stop, base, strict=True))
