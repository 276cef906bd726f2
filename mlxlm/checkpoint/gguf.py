"""Reading GGUF, versions 2 and 3, little endian: the header with all its metadata, and tensors by name.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from mlxlm.checkpoint.gguf_tensors import PLAIN_TYPES, QUANTIZED_TYPES, TYPES, GgufReader
from mlxlm.checkpoint.tensors import Checkpoint, TensorInfo
from mlxlm.errors import CheckpointError, ModelNotFoundError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_RANK = 4
_MAX_DIMENSION = 2**31 - 1  # MLX counts a dimension in 32 bits
_MAX_NESTING = 8

_STRING, _ARRAY = 8, 9
_SCALARS = {
    number: struct.Struct("<" + code)
    for number, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_LENGTH = struct.Struct("<Q")


class _Malformed(Exception):
    """The header contradicts the format; the text says how."""


def open_gguf(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a GGUF file; only the header is read.

    `load` reads Q4_0, Q4_1 and Q8_0 as MLX's weight, scales and biases in groups of 32, plain types as they are (F64 as
    float32), and every other block type (K-quants, IQ, TQ, MXFP4, ...) as float32 values. Shapes are row-major, GGUF's
    reversed.

    Raises ModelNotFoundError when there is no such file; CheckpointError when it is truncated, malformed, big endian,
    of another version, or one part of a split model.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFoundError(f"no such file: {path}")
    try:
        with open(path, "rb") as file:
            _check_start(path, file.read(24))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except _Malformed as error:
        raise CheckpointError(f"{path} has a malformed header: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error


def _check_start(path: Path, start: bytes) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the model; run: git lfs pull")
    if not start.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a GGUF file: it starts with {start[:4]!r}, not {_MAGIC!r}")
    if len(start) < 24:
        raise CheckpointError(f"{path} is truncated after {len(start)} bytes; download it again")
    version = int.from_bytes(start[4:8], "little")
    if int.from_bytes(start[4:8], "big") in (1, *_VERSIONS):
        raise CheckpointError(f"{path} is a big endian GGUF file; mlxlm reads little endian ones")
    if version not in _VERSIONS:
        raise CheckpointError(f"{path} is GGUF version {version}; mlxlm reads versions 2 and 3")


def _parse(path: Path, data: mmap.mmap) -> Checkpoint:
    header = _Header(path, data)
    header.position = 8
    num_tensors, num_keys = header.length(), header.length()
    header.check_count(num_keys, 13, "keys")  # a key: a length, a type and at least one byte of value
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = header.string("a key")
        if key in metadata:
            raise _Malformed(f"key {key!r} occurs twice")
        metadata[key] = header.value(header.scalar(4), key)
    split = metadata.get("split.count", 1)
    if isinstance(split, int) and split > 1:
        raise CheckpointError(f"{path} is one of {split} parts; join them with: gguf-split --merge FIRST_PART OUTPUT")

    header.check_count(num_tensors, 32, "tensors")  # a tensor: name length, rank, one dimension, type, offset
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    for _ in range(num_tensors):
        info, offset = header.tensor()
        if info.name in tensors:
            raise _Malformed(f"tensor {info.name!r} occurs twice")
        tensors[info.name], offsets[info.name] = info, offset
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    start = _start_of_data(header, alignment, bool(tensors))
    _check_layout(path, tensors, offsets, alignment, len(data) - start)
    positions = {name: start + offset for name, offset in offsets.items()}
    return Checkpoint(tensors, metadata, GgufReader(path, positions))


class _Header:
    """A cursor over the header. Every length is compared with what is left of the file before it is used."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0

    def require(self, nbytes: int) -> None:
        """Raise unless `nbytes` more bytes are there."""
        if nbytes > self.size - self.position:
            missing = nbytes - (self.size - self.position)
            raise CheckpointError(
                f"{self.path} is truncated or damaged: at byte {self.position} of {self.size} its header claims "
                f"{missing} bytes more than there are; download it again"
            )

    def check_count(self, count: int, least: int, what: str) -> None:
        """Raise when the file can't hold `count` things of at least `least` bytes."""
        if count > (self.size - self.position) // least:
            raise CheckpointError(f"{self.path} is truncated or damaged: no room for {count} {what}; download it again")

    def scalar(self, kind: int) -> Any:
        """One number or bool of a GGUF value type."""
        layout = _SCALARS[kind]
        self.require(layout.size)
        (value,) = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return value

    def length(self) -> int:
        return self.scalar(10)

    def string(self, what: str) -> str:
        length = self.length()
        self.require(length)
        raw = self.data[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Malformed(f"{what} is not valid UTF-8: {raw[:40]!r}") from error

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        """A value of any type: str, int, float, bool, list[str], list of arrays, or a numpy array."""
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind != _ARRAY:
            raise _Malformed(f"{key!r} has the unknown value type {kind}")
        if depth == _MAX_NESTING:
            raise _Malformed(f"{key!r} nests arrays deeper than {_MAX_NESTING}")
        of, count = self.scalar(4), self.length()
        if of == _STRING:
            return self.strings(count, key)
        if of in _SCALARS:
            layout = _SCALARS[of]
            self.require(count * layout.size)
            raw = self.data[self.position : self.position + count * layout.size]
            self.position += len(raw)
            return np.frombuffer(raw, layout.format).astype(np.dtype(layout.format).newbyteorder("="))
        self.check_count(count, 12, f"arrays in {key!r}")  # an array: type and length
        return [self.value(of, key, depth + 1) for _ in range(count)]

    def strings(self, count: int, key: str) -> list[str]:
        """Many strings: `string` in a loop without its calls, because vocabularies have 50,000 to 300,000 of them."""
        self.check_count(count, 8, f"strings in {key!r}")
        data, size, position, unpack = self.data, self.size, self.position, _LENGTH.unpack_from
        last = size - 8
        result: list[str] = []
        append = result.append
        try:
            for _ in range(count):
                if position > last:
                    break
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    break
                append(str(data[start:position], "utf-8"))
        except UnicodeDecodeError as error:
            raise _Malformed(f"item {len(result)} of {key!r} is not valid UTF-8: {error.object[:40]!r}") from error
        if len(result) < count:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: string {len(result)} of {count} in {key!r} reaches beyond its "
                "end; download it again"
            )
        self.position = position
        return result

    def tensor(self) -> tuple[TensorInfo, int]:
        """A tensor's entry, and where its data starts behind the header."""
        name = self.string("a tensor's name")
        rank = self.scalar(4)
        if rank > _MAX_RANK:
            raise _Malformed(f"tensor {name!r} has {rank} dimensions; GGUF has at most {_MAX_RANK}")
        shape = tuple(self.length() for _ in range(rank))[::-1]
        number, offset = self.scalar(4), self.length()
        if any(dimension > _MAX_DIMENSION for dimension in shape):
            raise _Malformed(f"tensor {name!r} has the impossible shape {shape}")
        if number not in TYPES:
            raise _Malformed(f"tensor {name!r} has the unknown type {number}")
        kind, values, nbytes = TYPES[number]
        row = shape[-1] if shape else 1
        if row % values:
            raise _Malformed(f"tensor {name!r} has rows of {row} values, not a multiple of {kind}'s {values}")
        return (
            TensorInfo(
                name=name,
                shape=shape,
                dtype=PLAIN_TYPES.get(kind, kind),
                file=self.path,
                nbytes=math.prod(shape) // values * nbytes,
                quantization=QUANTIZED_TYPES.get(kind),
            ),
            offset,
        )


def _start_of_data(header: _Header, alignment: Any, has_tensors: bool) -> int:
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise _Malformed(f"general.alignment is {alignment!r}, not a power of two")
    return -(-header.position // alignment) * alignment if has_tensors else header.position


def _check_layout(
    path: Path, tensors: dict[str, TensorInfo], offsets: dict[str, int], alignment: int, available: int
) -> None:
    """Each tensor starts at a multiple of the alignment, behind the end of the one before, and ends within the file."""
    end, before = 0, ""
    for name in sorted(tensors, key=lambda name: (offsets[name], offsets[name] + tensors[name].nbytes)):
        if offsets[name] % alignment:
            raise _Malformed(f"tensor {name!r} starts at {offsets[name]}, not at a multiple of {alignment}")
        if offsets[name] < end:
            raise _Malformed(f"the data of tensors {before!r} and {name!r} overlap")
        end, before = offsets[name] + tensors[name].nbytes, name
    if end > available:
        raise CheckpointError(f"{path} is truncated: {end - available} bytes are missing; download it again")
