"""Weights in several files: the index that lists them, and the rule that none lies outside its directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mlxlm.checkpoint.files import read_json
from mlxlm.checkpoint.tensors import TensorInfo
from mlxlm.errors import CheckpointError


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says. Raises CheckpointError when it says nothing of the kind."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f'{index} has no "weight_map" of tensor names to file names')
    if not weight_map:
        raise CheckpointError(f'{index} has an empty "weight_map"')
    return weight_map


def inside(directory: Path, name: str) -> Path:
    """directory/name.

    Raises CheckpointError when it lies elsewhere: absolute, through "..", or behind a link that leaves the directory.
    """
    root, file = directory.resolve(), directory / name
    try:
        target = file.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: file {name!r} can't be found: {error}") from error
    allowed = [root, *_hub_blobs(root)]
    if Path(name).is_absolute() or ".." in Path(name).parts or not any(map(target.is_relative_to, allowed)):
        raise CheckpointError(f"{directory}: file {name!r} lies outside the directory (at {target})")
    return file


def _hub_blobs(root: Path) -> Iterator[Path]:
    """Where the links of a Hugging Face cache folder lead, if `root` is models--<org>--<name>/snapshots/<revision>."""
    repository = root.parent.parent
    if root.parent.name == "snapshots" and "--" in repository.name:
        yield repository / "blobs"
        yield repository.parent / "blobs"  # shared by the repositories of a cache


def compare_with_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError that lists all that an index and the headers of its shards say differently."""
    absent = sorted(weight_map.keys() - tensors.keys())
    unlisted = sorted(tensors.keys() - weight_map.keys())
    moved = sorted(name for name in weight_map.keys() & tensors.keys() if _elsewhere(weight_map, tensors, name))
    parts: Iterable[tuple[str, list[str]]] = (
        ("listed but in no shard", absent),
        ("in a shard but not listed", unlisted),
        ("in another shard than listed", moved),
    )
    problems = [f"{len(names)} {what}: {', '.join(names)}" for what, names in parts if names]
    if problems:
        raise CheckpointError(f"{index} and its shards disagree: {'; '.join(problems)}")


def _elsewhere(weight_map: dict[str, str], tensors: dict[str, TensorInfo], name: str) -> bool:
    file = tensors[name].file
    return not file.match(weight_map[name])
