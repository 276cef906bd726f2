"""Rows of different lengths made into arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mlxlm.data.batch import IGNORE
from mlxlm.errors import UsageError

_MULTIPLE = 64


def padded_length(length: int, limit: int) -> int:
    """The columns of a batch whose longest row has `length` tokens: few different ones, so that few steps compile.

    Multiples of 64 up to 512, then an eighth of a power of two more at most; never more than `limit`.
    """
    step = _MULTIPLE
    while length > 8 * step:
        step *= 2
    return min(-(-max(length, 1) // step) * step, max(limit, length))


def pad(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """Rows as int32 (B, length), filled on the right with `value`."""
    out = np.full((len(rows), length), value, dtype=np.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def pad_targets(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """`pad` with the value that carries no loss."""
    return pad(rows, length, IGNORE)


def lengths(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Tokens of each row, int32 (B,)."""
    return np.array([len(row) for row in rows], dtype=np.int32)


def joined(row: Sequence[np.ndarray], limit: int, drop: int | None = None) -> np.ndarray:
    """The pieces of a row one after the other, int32.

    drop: an end-of-text id to leave out at the end of each piece, None keeps everything.
    Raises UsageError for a row without tokens or with more than `limit`.
    """
    pieces = [np.asarray(piece, dtype=np.int32) for piece in row]
    if drop is not None:
        pieces = [piece[:-1] if len(piece) > 1 and piece[-1] == drop else piece for piece in pieces]
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    if not 1 <= len(tokens) <= limit:
        raise UsageError(f"a row has {len(tokens)} tokens; expected 1 to {limit}")
    return tokens
