"""Checkpoints of several processes: each writes the pieces of arrays that it alone holds, and reads those it needs.

A file `parameters-00002-of-00004.safetensors` has pieces of whole arrays under the names of these; its metadata
`pieces` says, as JSON, of what shape each array is and where its piece begins. Files without it have whole arrays. So a
run can go on with other processes, or with one.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlm.checkpoint import open_safetensors, read_json, save_safetensors, write_json_atomic
from mlxlm.checkpoint.files import sync_directory
from mlxlm.distributed import Parallel
from mlxlm.distributed.pieces import Piece
from mlxlm.errors import CheckpointError
from mlxlm.training.checkpoints import Arrays, Checkpoints, TrainingState, checked_files

Layout = Callable[[], Mapping[str, Arrays]]


class SharedCheckpoints(Checkpoints):
    """The checkpoints of a run of several processes, which see the same folder. All call every method together.

    parallel: what this process holds.  layout: the arrays of this process by part and name, whose shapes count.
    """

    def __init__(self, folder: Path, keep_last: int, parallel: Parallel, layout: Layout):
        super().__init__(folder, keep_last)
        self.parallel, self.world, self._layout = parallel, parallel.world, layout

    def steps(self) -> list[int]:
        """See `Checkpoints.steps`, as the first process sees it."""
        return self.world.share(super().steps() if self.parallel.first else None)

    def save(self, step: int, state: TrainingState) -> Path:
        """See `Checkpoints.save`; all raise the error of any."""
        target = self.path(step)
        temporary = self.folder / f".{target.name}.{self.world.share(secrets.token_hex(4))}.tmp"
        try:
            self._all(lambda: temporary.mkdir(parents=True) if self.parallel.first else None, target)
            sizes = self._all(lambda: self._write(temporary, state), target)
            files = {name: size for each in sizes for name, size in each.items()}
            self._all(lambda: self._publish(step, temporary, files, state.values), target)
        finally:
            if self.parallel.first:
                shutil.rmtree(temporary, ignore_errors=True)
        return target

    def load(self, step: int) -> TrainingState:
        """See `Checkpoints.load`; arrays are the pieces that this process holds."""
        path = self.path(step)
        values = read_json(path / "state.json")
        files = checked_files(path, step, values)
        arrays = {part: read_pieces(files[part], self._wanted(held)) for part, held in self._layout().items()}
        return TrainingState(arrays, values)

    def mark_best(self, step: int, loss: float) -> None:
        """See `Checkpoints.mark_best`."""
        if self.parallel.first:
            super().mark_best(step, loss)

    def best(self) -> int | None:
        """See `Checkpoints.best`, as the first process sees it."""
        return self.world.share(super().best() if self.parallel.first else None)

    def prune(self) -> None:
        """See `Checkpoints.prune`."""
        self._remove_but(set(self.steps()[-self.keep_last :]) | {self.best()}, self.steps())

    def _remove_but(self, kept: set[int | None], steps: list[int]) -> None:
        if self.parallel.first:
            super()._remove_but(kept, steps)

    def newest_whole(self) -> tuple[int | None, list[str]]:
        """See `Checkpoints.newest_whole`, as the first process sees it."""
        return tuple(self.world.share(Checkpoints(self.run).newest_whole() if self.parallel.first else None))

    def recover(self) -> None:
        """See `Checkpoints.recover`."""
        if self.parallel.first:
            super().recover()

    def set_aside_after(self, step: int) -> None:
        """See `Checkpoints.set_aside_after`."""
        if self.parallel.first:
            Checkpoints(self.run).set_aside_after(step)

    def _write(self, folder: Path, state: TrainingState) -> dict[str, int]:
        """Write what this process alone holds; sizes of files by name."""
        sizes = {}
        rank, count = self.world.rank, self.world.size
        for part, arrays in state.arrays.items():
            own, places = {}, {}
            for name, array in arrays.items():
                piece = self.parallel.piece_to_write(_parameter(name), array.shape)
                if piece is not None:
                    own[name] = array[tuple(slice(0, n) for n in piece.size)] if array.ndim else array
                    places[name] = {"shape": list(piece.shape), "start": list(piece.start)}
            if own:
                metadata = {"format": "mlx", "pieces": json.dumps(places)}
                stem = f"{part}-{rank + 1:05d}-of-{count:05d}"
                (file,) = save_safetensors(folder, own, stem=stem, max_shard_bytes=2**62, metadata=metadata)
                sizes[file.name] = file.stat().st_size
        return sizes

    def _publish(self, step: int, temporary: Path, files: dict[str, int], values: dict[str, Any]) -> None:
        if not self.parallel.first:
            return
        unseen = sorted(name for name in files if not (temporary / name).is_file())
        if unseen:
            raise CheckpointError(
                f"{self.folder}: {unseen[0]} and {len(unseen) - 1} more that other processes wrote are not to be seen "
                "here: the run's folder must be on a disk that all machines share"
            )
        write_json_atomic(temporary / "state.json", {"files": files, **values})
        sync_directory(temporary)
        self._publish_folder(temporary, self.path(step))

    def _all(self, function: Callable[[], Any], target: Path) -> list[Any]:
        """What a function gives in every process. Raises CheckpointError everywhere when one can't do it."""
        try:
            told = {"done": function()}
        except (OSError, CheckpointError) as error:
            told = {"problem": f"rank {self.world.rank}: {error}"}
        every = [json.loads(text) for text in self.world.texts(json.dumps(told), f"checkpoint {target.name}")]
        problems = [one["problem"] for one in every if "problem" in one]
        if problems:
            raise CheckpointError(f"{target} can't be written: {problems[0]}")
        return [one["done"] for one in every]

    def _wanted(self, held: Arrays) -> dict[str, tuple[Piece, tuple[int, ...]]]:
        return {
            name: (self.parallel.piece_of(_parameter(name), array.shape), array.shape) for name, array in held.items()
        }


def read_pieces(files: Iterable[Path], wanted: Mapping[str, tuple[Piece, tuple[int, ...]]] | None = None) -> Arrays:
    """Arrays put together of the pieces in some files.

    wanted: of each array the piece to read, and the shape to fill up with zeros after it; default all of every array.
    Only files with something that is wanted are read, and of them only such arrays.
    Raises CheckpointError for arrays of other shapes than wanted, and for pieces that are missing.
    """
    found: dict[str, list[tuple[Piece, Path]]] = {}
    for file in files:
        checkpoint = open_safetensors(file)
        places = json.loads(checkpoint.metadata.get("pieces", "{}"))
        for name, info in checkpoint.tensors.items():
            piece = Piece.whole(info.shape)
            if name in places:
                start = tuple(places[name]["start"])
                stop = tuple(a + n for a, n in zip(start, info.shape, strict=True))
                piece = Piece(tuple(places[name]["shape"]), start, stop)
            found.setdefault(name, []).append((piece, file))
    if wanted is None:
        wanted = {name: (Piece.whole(parts[0][0].shape), parts[0][0].shape) for name, parts in found.items()}
    arrays = {}
    for name, (piece, shape) in wanted.items():
        if name in found:
            arrays[name] = _put_together(name, piece, shape, found[name])
    return arrays


def _put_together(name: str, wanted: Piece, shape: tuple[int, ...], parts: list[tuple[Piece, Path]]) -> mx.array:
    if parts[0][0].shape != wanted.shape:
        raise CheckpointError(f"{name} has the shape {parts[0][0].shape} in the checkpoint, expected {wanted.shape}")
    result, covered = None, 0
    for piece, file in parts:
        common = piece.common(wanted) if piece.shape else piece
        if common is None:
            continue
        array = open_safetensors(file).load([name])[name]
        covered += common.count
        if common == piece and piece.size == shape:
            result = array
            break
        result = mx.zeros(shape, dtype=array.dtype) if result is None else result
        result[common.slices(wanted.start)] = array[common.slices(piece.start)]
    if covered != wanted.count:
        raise CheckpointError(f"the checkpoint has {covered} of {wanted.count} values of {name}")
    result = mx.zeros(shape) if result is None else result
    mx.eval(result)
    return result


def _parameter(name: str) -> str:
    """The parameter that an array of an optimizer's state belongs to, "0/NAME/m"; a parameter's name as it is."""
    parts = name.split("/")
    return parts[1] if len(parts) > 2 else name
