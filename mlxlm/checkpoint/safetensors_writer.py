"""Writing safetensors: Hugging Face's shard names and index, and never a half-written checkpoint."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlm.checkpoint.files import durable_file, sync_directory, temporary_name, unwritable
from mlxlm.errors import CheckpointError

_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.complex64: "C64",
}


@dataclass(frozen=True)
class _Shard:
    temporary: Path
    names: list[str]
    nbytes: int
    size: int


def save_safetensors(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, mx.array] | Iterable[tuple[str, mx.array]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    stem: str = "model",
    total_parameters: int | None = None,
) -> list[Path]:
    """Write named arrays into a directory, which is made if need be; returns the weight files.

    One file `<stem>.safetensors`, or when the data exceeds `max_shard_bytes` (default 5 GB) shards
    `<stem>-00001-of-0000N.safetensors` with `<stem>.safetensors.index.json`. Tensors keep their order from shard to
    shard; one larger than a shard has its own. An array that is given under two names is written twice.

    metadata: strings for the header of every file, default {"format": "pt"} as Hugging Face's loaders want it.
    total_parameters: for the index; default the number of values, which for quantized weights (packed words, scales)
    is not the number of the model's parameters.

    Arrays are evaluated and written one by one, and given pairs are let go after their shard: a generator of lazy
    pairs needs the memory of one shard at most. Everything goes to temporary names first, then to the disk, and takes
    the final names at the end, the index last. Files of an earlier save of this stem that are no longer part of it,
    and temporary ones of a save that was killed, are removed after that. So a save that fails leaves the earlier one
    whole, also if the arrays were loaded lazily from the files being replaced.

    Raises CheckpointError when the operating system refuses a write, for a name that occurs twice, and for a dtype
    that safetensors doesn't have.
    """
    directory = Path(directory)
    pairs = iter(tensors.items() if isinstance(tensors, Mapping) else tensors)
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"metadata of safetensors are strings, not {key!r}: {value!r}")
    temporaries: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shards = []
        for batch in _batches(pairs, max_shard_bytes):
            temporaries.append(temporary_name(directory / f"{stem}.safetensors"))
            shards.append(_write_shard(temporaries[-1], batch, metadata))
        return _publish(directory, stem, shards, total_parameters, temporaries)
    except OSError as error:
        raise unwritable(directory, error) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class FileLayout:
    """A weight file before it is written.

    header: its first bytes.  positions: name -> first byte in the file and number of bytes.  size: of the file.
    """

    header: bytes
    positions: dict[str, tuple[int, int]]
    size: int


def safetensors_layout(
    entries: Iterable[tuple[str, mx.Dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> FileLayout:
    """The layout of a safetensors file with these tensors: name, dtype and shape.

    metadata: as for `save_safetensors`. Raises CheckpointError for a dtype that safetensors doesn't have.
    """
    # Wide values first: every tensor then starts at a multiple of its value's size, as readers that map the file want.
    entries = sorted(entries, key=lambda entry: -entry[1].size)
    header: dict[str, Any] = {}
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    if metadata:
        header["__metadata__"] = metadata
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for name, dtype, shape in entries:
        if dtype not in _NAMES:
            raise CheckpointError(f"can't save tensor {name!r}: safetensors has no type for {dtype}")
        nbytes = math.prod(shape) * dtype.size
        offsets[name] = position, nbytes
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    positions = {name: (start + begin, nbytes) for name, (begin, nbytes) in offsets.items()}
    return FileLayout(len(text).to_bytes(8, "little") + text, positions, start + position)


def bytes_of(array: mx.array) -> memoryview:
    """An array's values as bytes, row after row; evaluates it."""
    return memoryview(mx.contiguous(array.reshape(-1)).view(mx.uint8))


def _batches(pairs: Iterator[tuple[str, mx.array]], limit: int) -> Iterator[list[tuple[str, mx.array]]]:
    """Consecutive tensors of at most `limit` bytes together; at least one batch, possibly empty."""
    names: set[str] = set()
    batch: list[tuple[str, mx.array]] = []
    nbytes = 0
    for name, array in pairs:
        if name in names or name == "__metadata__":
            raise CheckpointError(f"can't save a tensor as {name!r}: the name is taken")
        names.add(name)
        if batch and nbytes + array.nbytes > limit:
            yield batch
            batch, nbytes = [], 0
        batch.append((name, array))
        nbytes += array.nbytes
        del array  # the generator's frame must not keep it beyond its batch
    yield batch


def _write_shard(path: Path, batch: list[tuple[str, mx.array]], metadata: dict[str, str]) -> _Shard:
    """Write a file and empty `batch` on the way."""
    layout = safetensors_layout(((name, array.dtype, array.shape) for name, array in batch), metadata)
    order = {name: place for place, name in enumerate(layout.positions)}
    batch.sort(key=lambda pair: order[pair[0]], reverse=True)
    size, names = sum(array.size for _, array in batch), list(order)
    with durable_file(path) as file:
        file.write(layout.header)
        while batch:
            file.write(bytes_of(batch.pop()[1]))
    return _Shard(path, names, layout.size - len(layout.header), size)


def _publish(
    directory: Path, stem: str, shards: list[_Shard], total_parameters: int | None, temporaries: list[Path]
) -> list[Path]:
    """Give complete shards their names, write the index, and remove what an earlier save had besides."""
    index = directory / f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        files = [directory / f"{stem}.safetensors"]
        os.replace(shards[0].temporary, files[0])
    else:
        names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        files = [directory / name for name in names]
        temporaries.append(temporary_name(index))
        _write_index(temporaries[-1], shards, names, total_parameters)
        _replace_shards(directory, [shard.temporary for shard in shards], files, index, temporaries)
    sync_directory(directory)
    _remove_stale(directory, stem, keep={*files, index} if len(shards) > 1 else {*files})
    return files


def _replace_shards(directory: Path, new: list[Path], files: list[Path], index: Path, temporaries: list[Path]) -> None:
    """Rename the shards and then the index, the last of `temporaries`."""
    new_index = temporaries[-1]
    if any(file.exists() for file in files):
        # An earlier save's shards have the same names. If something stops this amid the renames, the mixture must not
        # look whole: without an index but with the temporary one left over, a directory is refused.
        temporaries.clear()
        index.unlink(missing_ok=True)
        sync_directory(directory)
    try:
        for temporary, file in zip(new, files, strict=True):
            os.replace(temporary, file)
        os.replace(new_index, index)
    except OSError as error:
        raise CheckpointError(f"{directory}: the shards could be replaced only in part: {error}; save again") from error


def index_of(shards: Mapping[str, Iterable[str]], total_size: int, total_parameters: int) -> dict[str, Any]:
    """The content of an index.  shards: file name -> names of its tensors."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    return {
        "metadata": {"total_size": total_size, "total_parameters": total_parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _write_index(path: Path, shards: list[_Shard], names: list[str], total_parameters: int | None) -> None:
    parameters = sum(shard.size for shard in shards) if total_parameters is None else total_parameters
    files = {file: shard.names for shard, file in zip(shards, names, strict=True)}
    data = index_of(files, sum(shard.nbytes for shard in shards), parameters)
    with durable_file(path) as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def _remove_stale(directory: Path, stem: str, keep: set[Path]) -> None:
    ours = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    abandoned = re.compile(r"\." + ours.pattern + r"\.[0-9a-f]{8}\.tmp")  # by a save that was killed
    for file in directory.iterdir():
        if (ours.fullmatch(file.name) and file not in keep) or abandoned.fullmatch(file.name):
            file.unlink()
    sync_directory(directory)
