"""Checkpoints of a run: folders that are whole or not there at all.

    RUN/checkpoints/step-00000100/   parameters.safetensors  optimizer.safetensors  [average.safetensors]  state.json
    RUN/best.json                    which checkpoint had the lowest loss on the validation data

A checkpoint is written under a hidden name, brought to the disk, and only then renamed; it is removed in the opposite
order. So whatever moment the process or the machine stops at, each `step-` folder is complete. One that is damaged
later is passed over: a run goes on from the newest whole one.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlm.checkpoint import open_safetensors, read_json, save_safetensors, write_json_atomic
from mlxlm.checkpoint.files import sync_directory, unwritable
from mlxlm.errors import CheckpointError, MlxlmError

Arrays = dict[str, mx.array]

_NAME = re.compile(r"step-(\d{8,})\Z")
_REPLACED = ".replaced"
_PARTS = ("parameters", "optimizer", "average")


@dataclass(frozen=True)
class TrainingState:
    """All that a run needs to go on as if it had not stopped.

    arrays: by part ("parameters", "optimizer", "average"), then by name.  values: JSON-able: step, position of the
    data, random state, counters, settings.
    """

    arrays: dict[str, Arrays]
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run's folder.

    folder: of the run; made when something is written.  keep_last: newest ones that stay, the best one apart.
    """

    def __init__(self, folder: Path, keep_last: int = 3):
        self.run, self.folder, self.keep_last = folder, folder / "checkpoints", keep_last

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match.group(1)) for path in self.folder.iterdir() if (match := _NAME.match(path.name)))

    def newest_whole(self) -> tuple[int | None, list[str]]:
        """The step of the newest whole checkpoint, None without one, and what is wrong with each newer one."""
        problems = []
        for step in reversed(self.steps()):
            problem = self._damage(step)
            if problem is None:
                return step, problems
            problems.append(problem)
        return None, problems

    def _damage(self, step: int) -> str | None:
        """Which file of a checkpoint is missing, of another size than was written, or unreadable; None when whole."""
        path = self.path(step)
        try:
            for files in checked_files(path, step, read_json(path / "state.json")).values():
                for file in files:
                    open_safetensors(file)
        except MlxlmError as error:
            return str(error)
        return None

    def recover(self) -> None:
        """Give the name back to a checkpoint whose process was killed between taking it and naming the new one."""
        for path in self.folder.glob(f".*{_REPLACED}") if self.folder.is_dir() else ():
            target = self.folder / path.name[1:].removesuffix(_REPLACED)
            if target.exists():
                shutil.rmtree(path)
            else:
                os.rename(path, target)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: TrainingState) -> Path:
        """Write a checkpoint. Raises CheckpointError when the disk refuses; earlier ones are untouched then."""
        target = self.path(step)
        temporary = self.folder / f".{target.name}.{secrets.token_hex(4)}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            sizes = {}
            for part, arrays in state.arrays.items():
                (file,) = save_safetensors(temporary, arrays, stem=part, max_shard_bytes=2**62)
                sizes[file.name] = file.stat().st_size
            write_json_atomic(temporary / "state.json", {"files": sizes, **state.values})
            sync_directory(temporary)
            self._publish_folder(temporary, target)
        except OSError as error:
            raise unwritable(target, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _publish_folder(self, temporary: Path, target: Path) -> None:
        """Give a complete checkpoint its name, in place of one of the same step, if there is one: see `recover`."""
        replaced = target.with_name(f".{target.name}{_REPLACED}")
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            os.rename(target, replaced)
        os.rename(temporary, target)
        sync_directory(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def load(self, step: int) -> TrainingState:
        """A checkpoint. Raises CheckpointError for one that is missing or whose files have been changed."""
        from mlxlm.training.checkpoint_pieces import read_pieces

        path = self.path(step)
        values = read_json(path / "state.json")
        files = checked_files(path, step, values)
        return TrainingState({part: read_pieces(some) for part, some in files.items()}, values)

    def mark_best(self, step: int, loss: float) -> None:
        """Say which checkpoint is the best one so far; it is kept."""
        write_json_atomic(self.run / "best.json", {"step": step, "loss": loss})

    def best(self) -> int | None:
        """The step of the best checkpoint, None when there was no evaluation."""
        try:
            return int(read_json(self.run / "best.json")["step"])
        except (MlxlmError, KeyError, TypeError):
            return None

    def prune(self) -> None:
        """Remove all but the newest and the best, and what killed processes left."""
        kept = set(self.steps()[-self.keep_last :]) | {self.best()}
        self._remove_but(kept, self.steps())

    def _remove_but(self, kept: set[int | None], steps: list[int]) -> None:
        for step in steps:
            if step not in kept:
                self._remove(self.path(step))
        for rest in self.folder.glob(".*.tmp") if self.folder.is_dir() else ():
            shutil.rmtree(rest, ignore_errors=True)

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, which are damaged, to `damaged-step-...`: the run goes on from this
        one. None of them is the best one any more.
        """
        later = [one for one in self.steps() if one > step]
        for one in later:
            aside = self.folder / f"damaged-{self.path(one).name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self.path(one), aside)
        if self.best() in later:
            (self.run / "best.json").unlink()

    def _remove(self, path: Path) -> None:
        """Take the name away first, so that no half-removed checkpoint ever has it."""
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def checked_files(path: Path, step: int, values: dict[str, Any]) -> dict[str, list[Path]]:
    """The files of a checkpoint by part, of what its state.json says; "files" is taken out of the values.

    Raises CheckpointError for files that are missing or have been changed, and for what is no checkpoint of this step.
    """
    found: dict[str, list[Path]] = {}
    for name, size in values.pop("files", {}).items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            there = f"it has {file.stat().st_size:,} bytes" if file.is_file() else "it is missing"
            raise CheckpointError(f"{file} is damaged: {there}, {size:,} bytes were saved")
        found.setdefault(file.stem.partition("-")[0], []).append(file)
    missing = {"parameters", "optimizer"} - found.keys()
    if missing or values.get("step") != step or found.keys() - set(_PARTS):
        raise CheckpointError(f"{path} is no checkpoint of a training run")
    return found
