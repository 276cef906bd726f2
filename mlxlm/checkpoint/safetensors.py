"""Reading safetensors: one file, or a directory of shards with its index.

The header of every file (8 bytes of length, then JSON) is checked in full before MLX sees the file, because MLX trusts
it. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlm.checkpoint.shards import compare_with_index, inside, read_weight_map
from mlxlm.checkpoint.small_floats import NAMES, decode
from mlxlm.checkpoint.stored import StoredArray, StoredFile
from mlxlm.checkpoint.tensors import Checkpoint, TensorInfo
from mlxlm.errors import CheckpointError, ModelNotFoundError, listing, nearest

# Name on disk: (name in MLX, bits of a value).
_DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "U16": ("uint16", 16),
    "I16": ("int16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "U32": ("uint32", 32),
    "I32": ("int32", 32),
    "F32": ("float32", 32),
    "U64": ("uint64", 64),
    "I64": ("int64", 64),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "F4": ("float4_e2m1", 4),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3", 8),
    "F8_E8M0": ("float8_e8m0", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
}
# mx.load refuses these, or (E4M3, E8M0) hands out their raw bytes as uint8, which would pass for integers. Those of 4
# and 6 bits are packed in ways that their files don't say; the others are read here, as float32.
_UNREADABLE = frozenset(name for name, bits in _DTYPES.values() if bits < 8)
_DECODED = frozenset({*NAMES, "float64"})

_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSION = 2**31 - 1  # MLX counts a dimension in 32 bits
_MAX_RANK = 32
_AGAIN = "copy or download it again"
_GIT_LFS = b"version https://git-lfs"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def open_safetensors(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a safetensors file or in a directory; only headers are read.

    In a directory: model.safetensors, else the shards that model.safetensors.index.json (or the only other
    *.safetensors.index.json) names, else every *.safetensors.

    Raises ModelNotFoundError when nothing is there; CheckpointError for a file that is truncated or malformed, for an
    index and shards that disagree (all differences are listed), and for a file outside the directory: absolute, through
    "..", or a link that leaves it, other than into the blobs of the Hugging Face cache.
    """
    path = Path(path)
    if path.is_dir():
        files, weight_map, index = _files_of(path)
    elif path.exists():
        files, weight_map, index = [path], None, None
    else:
        raise ModelNotFoundError(f"no such file or directory: {path}")

    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, Any] = {}
    for file in files:
        header, file_metadata = _read_header(file)
        for tensor in header:
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise CheckpointError(f"tensor {tensor.name!r} is both in {other} and in {file.name} ({file.parent})")
            tensors[tensor.name] = tensor
        metadata = {**file_metadata, **metadata}
    if weight_map is not None and index is not None:
        compare_with_index(index, weight_map, tensors)
    strange = _DECODED | _UNREADABLE
    foreign = {tensor.file for tensor in tensors.values() if tensor.dtype in strange}
    stored = {file: StoredFile(file) for file in files}

    def view(tensor: TensorInfo) -> StoredArray | None:
        if tensor.dtype in strange or not tensor.nbytes:
            return None
        return stored[tensor.file].array(tensor.shape, tensor.dtype, tensor.position)

    return Checkpoint(tensors, metadata, lambda wanted: _load(wanted, foreign), view)


def _load(wanted: list[TensorInfo], foreign: set[Path]) -> dict[str, mx.array]:
    """foreign: files with a tensor of a type that MLX has not; it would refuse all of such a file."""
    arrays: dict[str, mx.array] = {}
    _refuse_unreadable(wanted)
    for file in dict.fromkeys(tensor.file for tensor in wanted):
        here = [tensor for tensor in wanted if tensor.file == file]
        try:
            if file in foreign:
                arrays.update((tensor.name, _read_values(tensor)) for tensor in here)
                continue
            # The format is named because MLX would otherwise guess it from the extension.
            content = mx.load(str(file), format="safetensors")
            arrays.update((tensor.name, content[tensor.name]) for tensor in here)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} can't be read: {error}") from error
    return {tensor.name: arrays[tensor.name] for tensor in wanted}


def _read_values(tensor: TensorInfo) -> mx.array:
    """A tensor read at once; float64, rounded, and floats of 8 bits, exactly, as float32."""
    kind = {"bfloat16": "u2", **dict.fromkeys(NAMES, "u1")}.get(tensor.dtype, tensor.dtype)
    dtype = np.dtype(kind).newbyteorder("<")
    data = np.fromfile(tensor.file, dtype, tensor.nbytes // dtype.itemsize, offset=tensor.position)
    data = data.reshape(tensor.shape)
    if tensor.dtype in NAMES:
        return mx.array(decode(tensor.dtype, data))
    if tensor.dtype == "float64":
        with np.errstate(over="ignore"):
            return mx.array(data.astype(np.float32))
    return mx.array(data).view(mx.bfloat16) if tensor.dtype == "bfloat16" else mx.array(data)


def _refuse_unreadable(wanted: list[TensorInfo]) -> None:
    by_dtype: dict[str, list[TensorInfo]] = {}
    for tensor in wanted:
        if tensor.dtype in _UNREADABLE:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
    if by_dtype:
        counts = listing(f"{len(some)} of {dtype} (such as {some[0].name})" for dtype, some in by_dtype.items())
        raise CheckpointError(
            f"{wanted[0].file.parent}: tensors of a type that can't be read: {counts}; save the model in float32, "
            "float16 or bfloat16"
        )


# ---------------------------------------------------------------------------------------------------- one file


def _read_header(file: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of a file in the order of their data, and its metadata."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if (start + stream.read(len(_GIT_LFS) - 8)).startswith(_GIT_LFS):
                raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run: git lfs pull")
            if len(start) < 8:
                raise CheckpointError(f"{file} is not a safetensors file: {size} bytes; {_AGAIN}")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file} is not a safetensors file: it claims a header of {length} bytes")
            if 8 + length > size:
                missing = 8 + length - size
                raise CheckpointError(f"{file} is truncated: {missing} bytes of its header are missing; {_AGAIN}")
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or error}") from error
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it doesn't start with '{'")
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
        metadata = _checked_metadata(header.pop("__metadata__", {}))
        entries = [_checked_tensor(file, name, entry) for name, entry in header.items()]
        tensors = [(replace(info, position=8 + length + begin), begin) for info, begin in entries]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a malformed header: {error}") from error
    return _checked_layout(file, tensors, size - 8 - length), metadata


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice!r} occurs twice")
    return result


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:  # what mx.save_safetensors writes when it is given none
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ isn't an object of strings")
    return metadata


def _checked_tensor(file: Path, name: str, entry: Any) -> tuple[TensorInfo, int]:
    """A tensor and the position of its first byte behind the header."""
    name.encode("utf-8")  # half a surrogate pair is valid JSON, but no text
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} doesn't have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}{nearest(str(dtype), _DTYPES)}")
    if not _are_naturals(shape) or len(shape) > _MAX_RANK or any(dimension > _MAX_DIMENSION for dimension in shape):
        raise ValueError(f"tensor {name!r} has the impossible shape {shape!r:.80}")
    if not _are_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has the impossible data_offsets {offsets!r:.80}")
    mlx_name, bits = _DTYPES[dtype]
    bits *= math.prod(shape)
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise ValueError(f"tensor {name!r} ({dtype} {shape}) has {end - begin} bytes of data, not {-(-bits // 8)}")
    return TensorInfo(name=name, shape=tuple(shape), dtype=mlx_name, file=file, nbytes=end - begin), begin


def _are_naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _checked_layout(file: Path, tensors: list[tuple[TensorInfo, int]], available: int) -> list[TensorInfo]:
    """The tensors in the order of their data, which must cover the rest of the file, each byte once."""
    needed = max((begin + tensor.nbytes for tensor, begin in tensors), default=0)
    if needed > available:
        raise CheckpointError(f"{file} is truncated: {needed - available} bytes are missing; {_AGAIN}")
    ordered = sorted(tensors, key=lambda pair: (pair[1], pair[1] + pair[0].nbytes))
    position = 0
    for tensor, begin in ordered:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise CheckpointError(f"{file} has a malformed header: the data of tensor {tensor.name!r} {kind}")
        position = begin + tensor.nbytes
    if position < available:
        raise CheckpointError(f"{file} has {available - position} bytes more than its header says; {_AGAIN}")
    return [tensor for tensor, _ in ordered]


# ---------------------------------------------------------------------------------------------------- a directory


def _files_of(directory: Path) -> tuple[list[Path], dict[str, str] | None, Path | None]:
    """The weight files of a directory, and the index they come from if they come from one."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [inside(directory, single.name)], None, None
    if not index.is_file():
        others = sorted(directory.glob("*.safetensors.index.json"))
        index = others[0] if len(others) == 1 else index
    if index.is_file():
        weight_map = read_weight_map(index)
        names = sorted(set(weight_map.values()))
        files = [inside(directory, name) for name in names]
        missing = [name for name, file in zip(names, files, strict=True) if not os.path.isfile(file)]
        if missing:
            raise CheckpointError(f"{directory} lacks {len(missing)} of {len(names)} shards: {listing(missing)}")
        return files, weight_map, index
    files = [inside(directory, file.name) for file in sorted(directory.glob("*.safetensors"))]
    if not files:
        raise ModelNotFoundError(f"{directory} holds no *.safetensors")
    _check_unindexed(directory, [file.name for file in files])
    return files, None, None


def _check_unindexed(directory: Path, names: list[str]) -> None:
    """Numbered shards without an index must at least be all there, and of one save."""
    if any(directory.glob(".*.safetensors.index.json.*.tmp")):
        raise CheckpointError(f"{directory}: a save was interrupted while it replaced the shards; save again")
    present = {match.groups() for match in map(_NUMBERED.fullmatch, names) if match}
    missing = [
        f"{stem}-{number:05d}-of-{total}.safetensors"
        for stem, total in sorted({(stem, total) for stem, _, total in present})
        for number in range(1, int(total) + 1)
        if (stem, f"{number:05d}", total) not in present
    ]
    if missing:
        raise CheckpointError(f"{directory} has no index and lacks {len(missing)} shards: {listing(missing)}")
