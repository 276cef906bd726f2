"""Reading PyTorch's weight files (.bin, .pt, .pth, .ckpt) without running the pickles in them.

A file is a zip archive (data.pkl, and one stored entry a storage under data/), or as before PyTorch 1.6 five pickles
and then all storages. What the pickles describe is checked against the bytes that are there; values are read from the
file when they are asked for.
Formats: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlxlm.checkpoint.pickles import DTYPES, Refused, Storage, StridedTensor, read_pickle
from mlxlm.checkpoint.shards import compare_with_index, inside, read_weight_map
from mlxlm.checkpoint.small_floats import NAMES, decode
from mlxlm.checkpoint.tensors import Checkpoint, TensorInfo
from mlxlm.errors import CheckpointError, ModelNotFoundError, listing

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
INDEX = "pytorch_model.bin.index.json"
_SINGLE = "pytorch_model.bin"
# What trainers leave beside a model.
_NO_MODEL = re.compile(r"(training_args|optimizer|scheduler|rng_state\w*|scaler|adapter_model|.*tokenizer.*)\.\w+")
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
# Under which names trainers keep the weights among other things.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_MAX_STORAGES = 200_000
_MAX_DIRECTORY_BYTES = 25_000_000  # of a zip archive: room for as many entries


def open_torch(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a PyTorch file or in a directory of them; pickles are interpreted, never run.

    In a directory: pytorch_model.bin, else the shards that pytorch_model.bin.index.json names, else the only other file
    of this kind. A file holds a state dict: names and tensors, possibly under "state_dict" or "model" beside other
    plain values. float64 and floats of 8 bits are read as float32.

    Raises ModelNotFoundError when nothing is there; CheckpointError for a file that is truncated, malformed, compressed
    or encrypted, or whose pickle refers to anything but tensors (which is named), for an index and shards that
    disagree, and for files outside the directory.
    """
    path = Path(path)
    weight_map = None
    if path.is_dir():
        files, weight_map = _files_of(path)
    elif path.exists():
        files = [path]
    else:
        raise ModelNotFoundError(f"no such file or directory: {path}")
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, _Place] = {}
    for file in files:
        for name, place in _read_file(file):
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is both in {tensors[name].file.name} and in {file.name}")
            tensors[name], places[name] = place.info(name, file), place
    if weight_map is not None:
        compare_with_index(path / INDEX, weight_map, tensors)
    return Checkpoint(tensors, {}, lambda wanted: {one.name: _load(one, places[one.name]) for one in wanted})


def torch_files(names: list[str]) -> list[str]:
    """Of the names in a directory those of PyTorch's weights, as far as names tell."""
    return [name for name in names if name.endswith(SUFFIXES) and not _NO_MODEL.fullmatch(name)]


def _files_of(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    if (directory / _SINGLE).is_file():
        return [inside(directory, _SINGLE)], None
    if (directory / INDEX).is_file():
        weight_map = read_weight_map(directory / INDEX)
        names = sorted(set(weight_map.values()))
        files = [inside(directory, name) for name in names]
        missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
        if missing:
            raise CheckpointError(f"{directory} lacks {len(missing)} of {len(names)} shards: {listing(missing)}")
        return files, weight_map
    names = sorted(torch_files(os.listdir(directory)))
    if not names:
        raise ModelNotFoundError(f"{directory} holds no PyTorch weights ({', '.join(SUFFIXES)})")
    if len(names) > 1:
        raise CheckpointError(f"{directory} holds several PyTorch files and no {INDEX}: {listing(names)}; give one")
    return [inside(directory, names[0])], None


@dataclass(frozen=True)
class _Place:
    """Where a tensor's values are.  start: of its storage in the file.  big_endian: how they are stored."""

    tensor: StridedTensor
    start: int
    big_endian: bool

    def info(self, name: str, file: Path) -> TensorInfo:
        dtype, size = DTYPES[self.tensor.dtype]
        nbytes = math.prod(self.tensor.shape) * size
        position = self.start + self.tensor.offset * size
        return TensorInfo(name=name, shape=self.tensor.shape, dtype=dtype, file=file, nbytes=nbytes, position=position)


def _load(info: TensorInfo, place: _Place) -> mx.array:
    dtype = np.dtype({"bfloat16": "u2", **dict.fromkeys(NAMES, "u1")}.get(info.dtype, info.dtype))
    dtype = dtype.newbyteorder(">" if place.big_endian else "<")
    strides, shape = place.tensor.strides, info.shape
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    try:
        if not info.nbytes:
            values = np.empty(shape, dtype)
        else:
            run = np.memmap(info.file, dtype, "r", info.position, (extent,))
            steps = tuple(stride * dtype.itemsize for stride in strides)
            values = np.lib.stride_tricks.as_strided(run, shape, steps, writeable=False)
            values = np.array(values, dtype.newbyteorder("="), order="C")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{info.file} can't be read: {error}") from error
    if info.dtype in NAMES:
        values = decode(info.dtype, values)
    elif info.dtype == "float64":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    array = mx.array(values)
    return array.view(mx.bfloat16) if info.dtype == "bfloat16" else array


# ---------------------------------------------------------------------------------------------------- one file


def _read_file(file: Path) -> Iterator[tuple[str, _Place]]:
    """Names and places of the tensors in a file."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run: git lfs pull")
            stream.seek(0)
            if start.startswith(b"PK"):
                value, starts, big_endian = _read_archive(stream)
            else:
                (value, starts), big_endian = _read_legacy(stream, size), False
        for name, tensor in _state_dict(value).items():
            _check(name, tensor, starts[tensor.storage.key])
            yield name, _Place(tensor, starts[tensor.storage.key][0], big_endian)
    except Refused as error:
        raise CheckpointError(f"{file} can't be read as PyTorch weights: {error}; nothing in it was run") from error
    except KeyError as error:
        raise CheckpointError(f"{file} is damaged: it has no storage {error}") from error
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or error}") from error


# Key of a storage -> its first byte in the file, and how many bytes it has.
_Starts = dict[str, tuple[int, int]]


def _read_archive(stream: BinaryIO) -> tuple[Any, _Starts, bool]:
    size = os.fstat(stream.fileno()).st_size
    _check_directory(stream, size)
    with _zip_archive(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise Refused("it is a zip archive, but not one that torch.save made (no data.pkl)")
        prefix = pickles[0].removesuffix("data.pkl")
        used = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
        if len(used) > _MAX_STORAGES:
            raise Refused(f"it has {len(used)} entries")
        packed = [name for name, entry in used.items() if entry.compress_type or entry.flag_bits & 1]
        if packed:
            raise Refused(f"it is compressed or encrypted ({listing(packed, 3)}), as PyTorch never writes it")
        order = entries.get(f"{prefix}byteorder")
        big_endian = order is not None and _entry(stream, order, size, 16) == b"big"
        starts = {
            name.removeprefix(f"{prefix}data/"): (_start_of(stream, entry, size), entry.file_size)
            for name, entry in used.items()
            if name.startswith(f"{prefix}data/")
        }
        stream.seek(_start_of(stream, entries[pickles[0]], size))
        return read_pickle(stream), starts, big_endian


def _zip_archive(stream: BinaryIO) -> zipfile.ZipFile:
    """Raises Refused for one with a damaged directory, which the library reports in several ways."""
    try:
        return zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OverflowError, struct.error) as error:
        raise Refused(f"it is a damaged zip archive ({error})") from error


def _check_directory(stream: BinaryIO, size: int) -> None:
    """Raise Refused when the archive's directory is larger than any model's, before all of it is read."""
    tail_size = min(size, 66_000)
    stream.seek(size - tail_size)
    tail = stream.read(tail_size)
    found = []
    for mark, place, length in ((b"PK\5\6", 12, 4), (b"PK\6\6", 40, 8)):  # the end record, and that of large archives
        at = tail.rfind(mark)
        if at >= 0:
            found.append(int.from_bytes(tail[at + place : at + place + length], "little"))
    if any(_MAX_DIRECTORY_BYTES < claimed != 2**32 - 1 for claimed in found):
        raise Refused(f"it claims a directory of {max(found)} bytes")
    stream.seek(0)


def _start_of(stream: BinaryIO, entry: zipfile.ZipInfo, size: int) -> int:
    """The first byte of a stored entry: behind its local header, whose lengths may differ from the directory's."""
    stream.seek(entry.header_offset)
    header = stream.read(30)
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise Refused(f"the entry {entry.filename!r} has no header where its directory says")
    start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + entry.file_size > size:
        raise Refused(f"it is truncated: the entry {entry.filename!r} reaches beyond its end; download it again")
    return start


def _entry(stream: BinaryIO, entry: zipfile.ZipInfo, size: int, limit: int) -> bytes:
    stream.seek(_start_of(stream, entry, size))
    return stream.read(min(entry.file_size, limit))


def _read_legacy(stream: BinaryIO, size: int) -> tuple[Any, _Starts]:
    """Magic number, version, facts on the machine, the object, the keys of its storages, then these one by one."""
    start = stream.read(2)
    stream.seek(0)
    if start[:1] != b"\x80":
        raise Refused(f"it starts with {start!r}: neither a zip archive nor a pickle")
    magic = read_pickle(stream)
    if magic != _MAGIC:
        raise Refused("it is a pickle, but not one that torch.save made")
    storages: dict[str, Storage] = {}
    version, machine, value, keys = (read_pickle(stream, storages) for _ in range(4))
    if version != _VERSION:
        told = version if isinstance(version, int) else f"a {type(version).__name__}"
        raise Refused(f"it is of version {told}, not {_VERSION}")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(keys) > _MAX_STORAGES:
        raise Refused("it doesn't list its storages")
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise Refused("it was written on a big endian machine before PyTorch 1.6")
    starts: _Starts = {}
    for key in keys:
        if key not in storages:
            raise Refused(f"it lists a storage {key!r} that nothing refers to")
        count = int.from_bytes(stream.read(8), "little", signed=True)
        nbytes = _bytes_of(storages[key])
        position = stream.tell()
        if count != storages[key].count or position + nbytes > size:
            raise Refused(f"it is truncated or damaged at its storage {key!r}; download it again")
        starts[key] = (position, nbytes)
        stream.seek(position + nbytes)
    return value, starts


def _bytes_of(storage: Storage) -> int:
    return storage.count * DTYPES[storage.dtype][1]


def _state_dict(value: Any) -> dict[str, StridedTensor]:
    """The named tensors of an object: a dict of them, or one that holds such a dict under a usual name."""
    if isinstance(value, dict) and not any(isinstance(item, StridedTensor) for item in value.values()):
        value = next((value[name] for name in _WRAPPERS if isinstance(value.get(name), dict)), value)
    if not isinstance(value, dict):
        raise Refused(f"it holds a {type(value).__name__}, not a dict of names and tensors")
    wrong = [
        f"{str(name)[:80]} ({type(item).__name__})"
        for name, item in value.items()
        if not (isinstance(name, str) and isinstance(item, StridedTensor))
    ]
    if wrong:
        raise Refused(f"{len(wrong)} of its {len(value)} entries are no named tensors: {listing(wrong, 5)}")
    return value


def _check(name: str, tensor: StridedTensor, place: tuple[int, int]) -> None:
    """Raise Refused unless the tensor's values are within its storage, and the storage's within the file."""
    _, size = DTYPES[tensor.dtype]
    needed = _bytes_of(tensor.storage)
    if needed > place[1]:
        raise Refused(f"the storage of tensor {name!r} has {place[1]} bytes of {needed}")
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if count and (last + 1) * size > needed:
        raise Refused(f"tensor {name!r} reaches beyond its storage")
    if count * size > needed:
        raise Refused(f"tensor {name!r} repeats a storage of {needed} bytes to {count * size}")
