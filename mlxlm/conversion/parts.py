"""Files that are written piece by piece, survive an interruption, and take their names when they are whole.

Everything grows in a hidden folder beside the target, with a journal of the moves whose bytes have reached the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlxlm.checkpoint.files import sync_directory
from mlxlm.checkpoint.safetensors_writer import FileLayout
from mlxlm.errors import CheckpointError, MlxlmError, UsageError

_PLAN, _JOURNAL, _LOCK = ".plan", ".journal", ".lock"
# After so many bytes, or seconds, what is written is brought to the disk and into the journal.
_BETWEEN_SYNCS, _SECONDS = 256 * 10**6, 5.0
_MARGIN = 64 * 10**6


class Parts:
    """The files of one conversion while they grow.

    target: the file or folder that they become.  files: name -> layout.  identity: what is being done; what an
    interrupted run of another identity left is thrown away.
    """

    def __init__(self, target: Path, files: Mapping[str, FileLayout], identity: str) -> None:
        self.target = target
        self.files = dict(files)
        self.identity = identity
        self.folder = target.with_name(f".{target.name}.converting")
        self.notes: dict[int, Any] = {}
        self._open: dict[str, BinaryIO] = {}
        self._pending: list[tuple[int, Any]] = []
        self._unsynced = 0
        self._synced_at = time.monotonic()

    @property
    def size(self) -> int:
        """Bytes of all files when they are whole."""
        return sum(layout.size for layout in self.files.values())

    @contextlib.contextmanager
    def opened(self) -> Iterator[Parts]:
        """The folder with its files, this process's alone; `notes` then holds what earlier runs got done.

        Raises UsageError when the target is there already or another process is at it, CheckpointError when the disk
        is too small or refuses.
        """
        check_free(self.target)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / _LOCK, "a+b") as lock:
                _lock(lock, self.folder)
                self._resume()
                self._check_space()
                for name, layout in self.files.items():
                    self._open[name] = open(self.folder / name, "r+b" if self.notes else "w+b")  # noqa: SIM115
                    self._open[name].write(layout.header)
                    self._open[name].truncate(layout.size)
                (self.folder / _PLAN).write_text(self.identity)
                try:
                    yield self
                except MlxlmError:  # a source that can't be converted: nothing to go on with
                    shutil.rmtree(self.folder, ignore_errors=True)
                    self._pending.clear()
                    raise
        except OSError as error:
            raise CheckpointError(f"can't write {self.folder}: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError, ValueError):
                if self._pending:  # interrupted: what is complete needn't be done again
                    self.sync()
            for file in self._open.values():
                with contextlib.suppress(OSError):
                    file.close()

    def write(self, file: str, name: str, data: bytes | memoryview) -> None:
        """One tensor's bytes. Raises CheckpointError when they are not as many as planned."""
        position, nbytes = self.files[file].positions[name]
        if len(data) != nbytes:
            raise CheckpointError(f"tensor {name!r} came out with {len(data)} bytes instead of {nbytes}")
        self._open[file].seek(position)
        self._open[file].write(data)
        self._unsynced += nbytes

    def done(self, move: int, note: Any) -> None:
        """Mark a move as written, with something to remember of it; durable after some more bytes or at the end."""
        self._pending.append((move, note))
        if self._unsynced > _BETWEEN_SYNCS or time.monotonic() - self._synced_at > _SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring all that is written to the disk, then say so in the journal."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        with open(self.folder / _JOURNAL, "a", encoding="utf-8") as journal:
            journal.writelines(json.dumps(entry) + "\n" for entry in self._pending)
            journal.flush()
            os.fsync(journal.fileno())
        self.notes.update(self._pending)
        self._pending.clear()
        self._unsynced, self._synced_at = 0, time.monotonic()

    def publish(self) -> None:
        """Give the result its name: the folder's, or where the target is a file, that of its only file."""
        self.sync()
        for file in self._open.values():
            file.close()
        check_free(self.target)
        is_file = set(self.files) == {self.target.name}
        for name in (_PLAN, _JOURNAL):
            (self.folder / name).unlink(missing_ok=True)
        if is_file:
            os.replace(self.folder / self.target.name, self.target)
            shutil.rmtree(self.folder)
        else:
            (self.folder / _LOCK).unlink()
            sync_directory(self.folder)
            os.rename(self.folder, self.target)
        sync_directory(self.target.parent)

    def _resume(self) -> None:
        """Read the journal of an earlier run of the same identity, or throw away what another one left."""
        plan = self.folder / _PLAN
        if plan.exists() and plan.read_text() == self.identity and all((self.folder / f).exists() for f in self.files):
            with contextlib.suppress(OSError, ValueError, TypeError):
                for line in (self.folder / _JOURNAL).read_text(encoding="utf-8").splitlines():
                    move, note = json.loads(line)
                    self.notes[int(move)] = note
            return
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _check_space(self) -> None:
        present = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
        needed, free = self.size - present + _MARGIN, shutil.disk_usage(self.folder).free
        if needed > free:
            if not self.notes:
                shutil.rmtree(self.folder)
            raise CheckpointError(
                f"{self.target} needs {needed / 1e9:.2f} GB more, but the disk has only {free / 1e9:.2f} GB free"
            )


def check_free(target: Path) -> None:
    """Raise UsageError when something stands where a result is to appear; an empty folder may."""
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if os.path.lexists(target):
        raise UsageError(f"{target} is there already; give another output, or remove it")


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no locks on this system: two runs in one folder are then the user's to avoid
        return
    except BlockingIOError:
        raise UsageError(f"another conversion is writing into {folder}; wait for it, or give another output") from None
