"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mlxlm.errors import UsageError

try:
    import fcntl
except ImportError:  # a system without it has no locks
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Keep other processes from training in a folder for a while; None locks nothing.

    The operating system gives the lock back when a process ends, however it does. Raises UsageError when another holds
    it. A file system without locks is passed over.
    """
    if folder is None or fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is training in {folder}; wait for its end, or choose another folder"
            ) from None
        except OSError:
            pass
        yield
