"""GPTQ: rounding weights one input after another, each error made up for by the inputs that are left.

Frantar et al. 2022, arXiv:2210.17323. With the mean H of x x^T over a module's inputs, the output error of a row that
changed by d is d H d^T; once input j is rounded, the optimal change of the later ones follows from the inverse of H,
whose Cholesky factor serves all inputs in order.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxlm.checkpoint import Quantization
from mlxlm.checkpoint.packed import pack_integers
from mlxlm.conversion.quantizing import Packed, quantize
from mlxlm.errors import UsageError

_BLOCK = 128
_DAMPING = 0.01


def compensated(weight: mx.array, gram: mx.array, form: Quantization, dtype: mx.Dtype) -> tuple[Packed, mx.array]:
    """A weight (out, in) in MLX's affine form, and the float32 values that it stands for.

    gram: (in, in), the mean of x x^T over inputs.  dtype: of scales and biases, which are MLX's own for each group as
    it is when the rounding gets there.
    Raises UsageError for other than the affine mode.
    """
    if form.mode != "affine":
        raise UsageError(f"error compensation is for the affine mode, not for {form.mode}")
    values = np.array(weight.astype(mx.float32))
    factor = _inverse_factor(np.array(gram, dtype=np.float64), values)
    rows, columns = values.shape
    integers = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, columns // form.group_size), np.float32)
    biases, rounded = np.empty_like(scales), np.empty_like(values)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = np.zeros((rows, end - start), np.float32)
        for column in range(start, end):
            group, first = divmod(column, form.group_size)
            if first == 0:
                scales[:, group], biases[:, group] = _grid(values[:, column : column + form.group_size], form, dtype)
            scale, bias, w = scales[:, group], biases[:, group], values[:, column]
            q = np.divide(w - bias, scale, out=np.zeros_like(w), where=scale != 0)
            q = np.clip(np.rint(q), 0, 2**form.bits - 1)
            integers[:, column], rounded[:, column] = q, scale * q + bias
            error = (w - rounded[:, column]) / factor[column, column]
            values[:, column + 1 : end] -= np.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        values[:, end:] -= errors @ factor[start:end, end:]
    packed = (
        mx.array(pack_integers(integers, form.bits)),
        mx.array(scales).astype(dtype),
        mx.array(biases).astype(dtype),
    )
    return packed, mx.array(rounded)


def _grid(values: np.ndarray, form: Quantization, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of one group of every row, as `mx.quantize` chooses them."""
    _, scales, biases = quantize(mx.array(np.ascontiguousarray(values)).astype(dtype), form)
    assert biases is not None
    return np.array(scales.astype(mx.float32))[:, 0], np.array(biases.astype(mx.float32))[:, 0]


def _inverse_factor(gram: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the damped inverse (in, in), float32; inputs that never came have no say."""
    dead = np.diag(gram) == 0
    gram[dead, dead] = 1.0
    values[:, dead] = 0.0
    damping = _DAMPING * np.diag(gram).mean()
    for _ in range(10):
        try:
            inverse = np.linalg.inv(np.linalg.cholesky(gram + damping * np.eye(len(gram))))
            return np.linalg.cholesky(inverse.T @ inverse).T.astype(np.float32)
        except np.linalg.LinAlgError:
            damping *= 10
    raise UsageError("the inputs of a module can't be told apart; use more calibration text")
