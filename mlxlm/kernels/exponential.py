"""The exponential function where its speed decides: inside softmax over large arrays."""

from __future__ import annotations

import mlx.core as mx

from mlxlm import runtime

_LOG2_E = 1.4426950408889634


def exp(x: mx.array) -> mx.array:
    """e ** x for float32. On the CPU by the power function: 5 ns an element instead of 16 (MLX 0.32, x86).

    The power function is fast for every argument whose result does not underflow, and for -inf; so hide elements by
    adding -inf there, not a large finite number.
    """
    return mx.power(2.0, x * _LOG2_E) if runtime.backend() == "cpu" else mx.exp(x)


def log_sum_exp(x: mx.array) -> mx.array:
    """log(sum(exp(x))) over the last axis, float32, by the same exponential; -inf where all of x is -inf."""
    if runtime.backend() != "cpu":
        return mx.logsumexp(x, axis=-1)
    top = x.max(-1, keepdims=True)
    top = mx.where(top == -mx.inf, 0.0, top)
    return (top + mx.log(exp(x - top).sum(-1, keepdims=True))).squeeze(-1)
