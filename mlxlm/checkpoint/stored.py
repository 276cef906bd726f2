"""Arrays that stay in their file: views of it, of which parts are read and nothing else.

The few operations of weight rules (slices, transposes, reshapes) make other views, so that a part of what a model calls
a weight is found in the file wherever its rows or columns lie.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

# MLX's names of types that numpy has no own for, as bytes of the same width.
_RAW = {"bfloat16": "uint16", "bool": "bool"}


class NotAView(Exception):
    """An operation whose result is no view of a file."""


class StoredFile:
    """A file that is mapped into memory when something of it is first read.  bytes_read: of all parts so far."""

    def __init__(self, path: Path):
        self.path, self.bytes_read = path, 0
        self._bytes: np.memmap | None = None

    def array(self, shape: tuple[int, ...], dtype: str, position: int) -> StoredArray:
        """The array of a type of MLX that begins at a byte of the file."""
        raw = np.dtype(_RAW.get(dtype, dtype)).newbyteorder("<")
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        flat = self._bytes[position : position + prod(shape) * raw.itemsize]
        return StoredArray(self, flat.view(raw).reshape(shape), dtype)


class StoredArray:
    """A view of a file's array, with the face of an array as far as weight rules need it.

    merged: how many of the view's axes stand for one with the next, as a reshape has joined them that no view can.
    Operations that no view can do raise NotAView.
    """

    def __init__(self, file: StoredFile, view: np.ndarray, dtype: str, merged: int = 0):
        self.file, self.dtype, self._view, self._merged = file, dtype, view, merged

    @property
    def shape(self) -> tuple[int, ...]:
        """See `mx.array`."""
        rows = self._merged + 1
        return (prod(self._view.shape[:rows]), *self._view.shape[rows:]) if self._view.ndim else ()

    @property
    def T(self) -> StoredArray:
        """See `mx.array`."""
        return self._made(self._plain().T)

    def __getitem__(self, key: slice | tuple[slice, ...]) -> StoredArray:
        return self._made(self._plain()[key])

    def swapaxes(self, one: int, other: int) -> StoredArray:
        """See `mx.array`."""
        return self._made(self._plain().swapaxes(one, other))

    def reshape(self, *sizes: int | tuple[int, ...]) -> StoredArray:
        """See `mx.array`."""
        view = self._plain()
        shape = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes
        known = prod(n for n in shape if n != -1)
        shape = tuple(view.size // known if n == -1 else n for n in shape)
        if view.flags.c_contiguous:
            return self._made(view.reshape(shape))
        merged = view.ndim - len(shape)
        if merged < 0 or view.shape[merged + 1 :] != shape[1:]:
            raise NotAView
        return StoredArray(self.file, view, self.dtype, merged)

    def astype(self, dtype: mx.Dtype) -> StoredArray:
        """No view can do it."""
        raise NotAView

    def read(self, start: tuple[int, ...] = (), stop: tuple[int, ...] = ()) -> mx.array:
        """The box from start to stop, default all of it, as an array in memory."""
        if not start:
            start, stop = (0,) * len(self.shape), self.shape
        box = tuple(slice(a, b) for a, b in zip(start[1:], stop[1:], strict=True))
        if not self._view.ndim:
            part = np.array(self._view)
        elif not self._merged:
            part = np.ascontiguousarray(self._view[(slice(start[0], stop[0]), *box)])
        else:
            part = self._read_merged(start[0], stop[0], box)
        self.file.bytes_read += part.nbytes
        array = mx.array(part)
        return array.view(mx.bfloat16) if self.dtype == "bfloat16" else array

    def _read_merged(self, first: int, last: int, box: tuple[slice, ...]) -> np.ndarray:
        """Rows of the joined axes: of each run of the last one what falls between first and last."""
        outer, length = self._view.shape[: self._merged], self._view.shape[self._merged]
        parts = []
        for number, index in enumerate(np.ndindex(*outer)):
            begin = number * length
            own = slice(max(first - begin, 0), min(last - begin, length))
            if own.start < own.stop:
                parts.append(self._view[(*index, own, *box)])
        empty = np.empty((0, *(part.stop - part.start for part in box)), self._view.dtype)
        return np.concatenate(parts) if parts else empty

    def _plain(self) -> np.ndarray:
        if self._merged:
            raise NotAView
        return self._view

    def _made(self, view: np.ndarray) -> StoredArray:
        return StoredArray(self.file, view, self.dtype)
