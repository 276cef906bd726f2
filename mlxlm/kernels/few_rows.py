"""Products of a few rows with a large weight on the CPU, as decoding needs them.

OpenBLAS copies a large right-hand matrix into packed form first, whatever the other one is; for a single row that is
three times the traffic of reading it once. Small matrices it reads in place (its small-matrix kernels). So the weight
is cut into blocks of rows below that size, which MLX multiplies one after another as a batch.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlxlm import runtime

# Multiplications up to which OpenBLAS (0.3.21, x86) was seen to take its kernels for small matrices: always up to the
# first number, and up to the second for weights with few rows.
_SMALL, _SMALL_AND_SHORT = 600_000, 1_000_000
_MOST_ROWS = 8


def few_rows_product(x: mx.array, weight: mx.array) -> mx.array:
    """x @ weight.T, (..., N) of x (..., K) and weight (N, K); faster on the CPU where x has few rows."""
    rows = x.size // x.shape[-1] if x.shape[-1] else 0
    if 0 < rows <= _MOST_ROWS and x.dtype == weight.dtype == mx.float32 and (size := _block(*weight.shape, rows)):
        blocks = weight.reshape(-1, size, weight.shape[1])
        out = x.reshape(1, rows, -1) @ blocks.swapaxes(1, 2)
        return out.transpose(1, 0, 2).reshape(*x.shape[:-1], weight.shape[0])
    return x @ weight.T


def pays() -> bool:
    """Whether products of few rows are made in blocks here."""
    return runtime.backend() == "cpu" and runtime.load_blas().status == "loaded"


@lru_cache(maxsize=256)
def _block(outputs: int, inputs: int, rows: int) -> int:
    """Rows of the weight in a block: the largest divisor that makes the product small; 0 for no blocks."""
    work = outputs * inputs * rows
    if work <= _SMALL or (work <= _SMALL_AND_SHORT and outputs <= 1024) or not pays():
        return 0
    most = _SMALL // (inputs * rows)
    return next((size for size in range(min(most, outputs), 31, -1) if outputs % size == 0), 0)
