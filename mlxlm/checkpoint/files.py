"""JSON files, and writing that never leaves a half-written file behind."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlxlm.errors import CheckpointError


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file (UTF-8).

    Raises CheckpointError when the file is absent, isn't JSON (with line and column) or holds something other than
    an object.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise CheckpointError(f"{path} is not valid JSON: {error.msg} at {where}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def write_json_atomic(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, keys in the given order; see `write_bytes_atomic`."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that its name always stands for the whole old or the whole new content.

    The bytes go to a temporary name in the same folder, to the disk, and then take the place of `path` (of a symbolic
    link itself, never of what it points to). Raises CheckpointError when that fails; the old file is then untouched.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with durable_file(temporary) as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """A new hidden name beside `path`: no loader's pattern matches it, and no other process uses it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A new file open for writing whose content has reached the disk when the block ends without an error."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """The error for a write that the operating system refused."""
    return CheckpointError(f"can't write {path}: {error.strerror or error}; what was there before is unchanged")
