"""What a weight file holds, known from its headers alone, and the door to its arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlm.checkpoint.quantization import Quantization
from mlxlm.checkpoint.stored import StoredArray
from mlxlm.errors import CheckpointError, nearest


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor on disk.

    shape: row-major, outermost dimension first, of the values it stands for.  dtype: "float32", "bfloat16",
    "uint32", ...; for a block type of GGUF its name there ("Q4_1").  nbytes: on disk.  quantization: set when the one
    tensor on disk becomes the three arrays weight, scales and biases; None for plain arrays, also for the three parts
    of a quantized weight in safetensors.  position: of its first byte in the file, 0 where that means nothing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    nbytes: int
    quantization: Quantization | None = None
    position: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """The tensors and the metadata of one or more weight files; only headers have been read.

    tensors: by name, in file order.  metadata: `__metadata__` of safetensors (of shards that disagree the first
    counts), or all of a GGUF file's keys as str, int, float, bool, list[str] and numpy arrays for numbers.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, Any]
    _read: Callable[[list[TensorInfo]], dict[str, mx.array]] = field(repr=False, compare=False)
    _stored: Callable[[TensorInfo], StoredArray | None] = field(default=lambda tensor: None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Size of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def stored(self, name: str) -> StoredArray | None:
        """A tensor as a view of its file, of which parts can be read alone; None where no file has it in that form."""
        return self._stored(self.tensors[name]) if name in self.tensors else None

    def load(self, names: Iterable[str] | None = None) -> dict[str, mx.array]:
        """Arrays of the named tensors, default all, in that order.

        Arrays from safetensors are lazy: they take memory when they are first evaluated, and keep it while they are
        referenced. What MLX has no type for (float64, floats of 8 bits, blocks of GGUF other than those below) is read
        at once and comes as float32. A tensor with `quantization` set (GGUF, GPTQ, AWQ) comes as MLX's three arrays:
        X.weight (uint32, rows of bits/32 words a value), X.scales and X.biases (floats, one of each a group).

        Raises CheckpointError for a name that isn't there and for tensors of a type that can't be read; the latter
        before anything is read.
        """
        if names is None:
            return self._read(list(self.tensors.values()))
        wanted = dict.fromkeys(names)
        for name in wanted:
            if name not in self.tensors:
                raise CheckpointError(f"no tensor {name!r} in the checkpoint{nearest(name, self.tensors)}")
        return self._read([self.tensors[name] for name in wanted])
