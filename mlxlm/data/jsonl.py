"""JSON Lines: one JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxlm.errors import DataError, listing


def read_jsonl(path: str | Path, *, field: str | None = None) -> Iterator[dict[str, Any]]:
    """The objects in a file, or in standard input for "-"; empty lines are passed over.

    field: a key that every row must have, with a string.  Raises DataError naming file and line for a line that is
    not UTF-8, not JSON, not an object or lacks the field, and for a file that can't be opened or has no rows.
    """
    name, found = str(path), False
    for number, line in enumerate(_lines(name), 1):
        if not line.strip():
            continue
        found = True
        yield _row(f"{name}, line {number}", line, field)
    if not found:
        raise DataError(f"{name} has no rows; expected one JSON object a line")


def _lines(name: str) -> Iterator[bytes]:
    if name == "-":
        yield from sys.stdin.buffer
        return
    try:
        with open(name, "rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{name} can't be read: {error.strerror}") from None


def _row(where: str, line: bytes, field: str | None) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: expected an object such as {{"text": "..."}}, not a {type(row).__name__}')
    if field is not None and not isinstance(row.get(field), str):
        problem = f"has no {field!r}; its keys: {listing(row)}" if field not in row else f"{field!r} is not a string"
        raise DataError(f"{where}: the row {problem}")
    return row
