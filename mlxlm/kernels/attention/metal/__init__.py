"""Our Metal kernels for attention: forward, all gradients, and decoding, launched through `mx.fast.metal_kernel`.

The kernels are the *.metal files in this folder. source.py specialises their text, operands.py turns masks and score
modifiers into the arrays they read, launch.py runs them; here they become one differentiable function. README.md in
the folder above holds the maths.
"""

from __future__ import annotations

import mlx.core as mx

from mlxlm import runtime
from mlxlm.kernels.attention.device import device_profile
from mlxlm.kernels.attention.mask import AttentionMask
from mlxlm.kernels.attention.metal.launch import Launcher
from mlxlm.kernels.attention.metal.operands import Arrays, constant_arrays
from mlxlm.kernels.attention.metal.source import MIN_HEAD_DIM, features
from mlxlm.kernels.attention.plan import MAX_HEAD_DIM, plan
from mlxlm.kernels.attention.problem import AttentionProblem, describe

__all__ = ["attention", "available", "serves"]

_LN2 = 0.6931471805599453


def available() -> bool:
    """Whether MLX's default device is an Apple GPU."""
    return runtime.backend() == "metal"


def serves(problem: AttentionProblem) -> str | None:
    """Why the kernels can't serve a problem, or None when they can."""
    for name, width in (("query and key", problem.head_dim), ("value", problem.value_dim)):
        if not MIN_HEAD_DIM <= width <= MAX_HEAD_DIM:
            return f"{name} heads are {width} wide; the kernels take {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    return None


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    *,
    scale: float,
    mask: AttentionMask,
    alibi_slopes: mx.array | None = None,
    relative_bias: mx.array | None = None,
    bias: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    dropout: float = 0.0,
    dropout_key: mx.array | None = None,
    return_lse: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention with the arguments and results of the reference, for a problem that `serves` accepts.

    The output is a view of an array in the order (B, Lq, H, Dv), so that joining the heads again copies nothing.
    """
    problem = describe(
        query, key, value, mask, alibi_slopes=alibi_slopes, relative_bias=relative_bias, bias=bias, softcap=softcap,
        sinks=sinks, dropout=dropout,
    )  # fmt: skip
    given = {
        "query": query, "key": key, "value": value, "alibi_slopes": alibi_slopes, "relative_bias": relative_bias,
        "bias": bias, "sinks": sinks,
    }  # fmt: skip
    inputs = {name: array for name, array in given.items() if array is not None}
    constants = constant_arrays(problem, mask, dropout_key)
    launcher = Launcher(
        plan=plan(problem, device_profile("metal")),
        features=features(problem, inputs, constants, scale=scale, softcap=softcap, dropout=dropout),
        constants=constants,
    )

    @mx.custom_function
    def run(inputs: Arrays) -> list[mx.array]:
        return list(launcher.forward(inputs))

    @run.vjp
    def run_vjp(inputs: Arrays, cotangents: list[mx.array], outputs: list[mx.array]) -> Arrays:
        out_gradient, lse_gradient = cotangents
        # The kernels' log-sum-exp is in base 2.
        gradients = launcher.backward(inputs, *outputs, out_gradient, lse_gradient * (1.0 / _LN2))
        return {name: gradients[name].astype(array.dtype) for name, array in inputs.items()}

    out, lse = run(inputs)
    return (out, lse * _LN2) if return_lse else out
