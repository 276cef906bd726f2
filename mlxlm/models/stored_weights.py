"""Weights of a model that are still on disk, so that a process which needs a part of them reads that part alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.checkpoint import Checkpoint, Quantization, dequantize
from mlxlm.checkpoint.stored import NotAView, StoredArray, StoredFile
from mlxlm.models.weights import Rule, to_canonical

Box = tuple[int, ...]
Read = Callable[[Box, Box], mx.array]


class StoredWeights:
    """Where the lazy arrays of a model come from; those that are no longer there have no part in it.

    Attribute files: that are read from.
    """

    def __init__(self) -> None:
        self._read: dict[int, tuple[mx.array, Read]] = {}
        self.files: set[StoredFile] = set()

    @property
    def bytes_read(self) -> int:
        """Of all weights so far."""
        return sum(file.bytes_read for file in self.files)

    def add(self, array: mx.array, sources: Iterable[StoredArray], read: Read) -> None:
        """Say that read(start, stop) gives any box of a lazy array, from these sources."""
        self._read[id(array)] = array, read  # the array itself keeps its number from being another's
        self.files |= {source.file for source in sources}

    def part(self, array: mx.array, start: Box, stop: Box) -> mx.array | None:
        """A box of an array, read now; None for an array that doesn't come straight from disk."""
        found = self._read.get(id(array))
        return None if found is None else found[1](start, stop)

    def edges(self, array: mx.array) -> mx.array:
        """The first and the last row of an array that comes from disk; another one as it is."""
        if id(array) not in self._read or array.ndim < 2:
            return array
        rows, rest = array.shape[0], array.shape[1:]
        zeros = (0,) * len(rest)
        ends = [self.part(array, (n, *zeros), (n + 1, *rest)) for n in (0, rows - 1)]
        return mx.concatenate(ends)  # type: ignore[arg-type]

    def finish(self, model: nn.Module) -> None:
        """Read what is left, array by array, so that little lives twice."""
        held = tree_flatten(model.parameters())
        while held:
            name, array = held.pop()
            if array.size:
                read = self.part(array, (0,) * array.ndim, array.shape)
                array = array if read is None else read
            mx.eval(array)
            model.update(tree_unflatten([(name, array)]))
        self._read.clear()


def stored_weights(
    checkpoint: Checkpoint,
    rules: Iterable[Rule],
    origins: Mapping[str, str],
    lazy: Mapping[str, mx.array],
    dequantized: Mapping[str, Quantization],
    dtype: mx.Dtype,
) -> StoredWeights:
    """The weights of a model that can be read from disk by parts.

    origins: the tensor on disk of each canonical name.  lazy: the model's arrays by canonical name.  dequantized:
    of modules whose weight is an array of values, though quantized on disk.  dtype: of all that is no integer.
    """
    views: dict[str, StoredArray] = {}
    for name in dict.fromkeys(origins.values()):
        stored = checkpoint.stored(name)
        if stored is not None:
            try:
                views |= to_canonical(rules, {name: stored}).tensors  # type: ignore[dict-item]
            except NotAView:
                continue
    found = StoredWeights()
    for name, array in lazy.items():
        form = dequantized.get(name.removesuffix(".weight"))
        if form is not None and name.endswith(".weight"):
            parts = [views.get(name.removesuffix("weight") + kind) for kind in ("weight", "scales", "biases")]
            if None not in parts[: 3 if form.has_biases else 2]:
                found.add(array, filter(None, parts), _values(parts, form, dtype))
        elif name in views and views[name].shape == array.shape:
            found.add(array, [views[name]], _plain(views[name], dtype))
    return found


def _plain(view: StoredArray, dtype: mx.Dtype) -> Read:
    def read(start: Box, stop: Box) -> mx.array:
        array = view.read(start, stop)
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    return read


def _values(parts: list[StoredArray | None], form: Quantization, dtype: mx.Dtype) -> Read:
    """Of a quantized weight: columns are read by whole groups and words, then cut."""
    unit = max(form.group_size, 32)

    def read(start: Box, stop: Box) -> mx.array:
        first, last = start[-1] // unit * unit, -(-stop[-1] // unit) * unit
        arrays = []
        for part, bits, each in zip(parts, (form.bits, 1, 1), (32, form.group_size, form.group_size), strict=True):
            columns = first * bits // each, last * bits // each
            arrays.append(None if part is None else part.read((*start[:-1], columns[0]), (*stop[:-1], columns[1])))
        values = dequantize(*arrays, form, dtype)  # type: ignore[arg-type]
        return values[..., start[-1] - first : stop[-1] - first]

    return read
