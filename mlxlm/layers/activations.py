"""Activation functions by name, elementwise on arrays of any shape.

They are plain functions on purpose: `mlx.nn` compiles its own, which on the CPU starts a C++ compiler at the first
call (about a second each). `fused` compiles on GPUs only, where it saves kernel launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlxlm.errors import ConfigError, nearest
from mlxlm.runtime import backend


def relu(x: mx.array) -> mx.array:
    """max(x, 0)."""
    return mx.maximum(x, 0)


def gelu(x: mx.array) -> mx.array:
    """x * P(X <= x) of a standard normal X, by the error function (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5)))


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), also called swish (same paper; Ramachandran et al. 2017, arXiv:1710.05941)."""
    return x * mx.sigmoid(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU by its tanh approximation (same paper, section 2)."""
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def gelu_sigmoid(x: mx.array) -> mx.array:
    """GELU by its sigmoid approximation, x * sigmoid(1.702 x) (same paper)."""
    return x * mx.sigmoid(1.702 * x)


def squared_relu(x: mx.array) -> mx.array:
    """max(x, 0) squared (So et al. 2021, arXiv:2109.08668)."""
    positive = relu(x)
    return positive * positive


def identity(x: mx.array) -> mx.array:
    """x itself: the gate of a bilinear unit (Shazeer 2020, arXiv:2002.05202)."""
    return x


_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_sigmoid": gelu_sigmoid,
    "silu": silu,
    "sigmoid": mx.sigmoid,
    "tanh": mx.tanh,
    "squared_relu": squared_relu,
    "identity": identity,
}

ACTIVATION_NAMES = tuple(_ACTIVATIONS)


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """The function called `name`, one of ACTIVATION_NAMES. Raises ConfigError for any other."""
    if name not in _ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}{nearest(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function` (elementwise) as one kernel on GPUs, unchanged on the CPU."""
    return function if backend() == "cpu" else mx.compile(function, shapeless=True)


def sparing(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function` (elementwise), whose gradient is computed from its arguments alone, each in one operation on a GPU.

    MLX's own gradient keeps what lies between arguments and result, or in a compiled step finds that it was computed
    before and keeps it for that: for a gated layer three arrays of its width, of nine that exist at the peak. Here the
    arguments are tied to the incoming gradient, so that nothing of the forward pass can be meant.
    """

    @mx.custom_function
    def run(*arguments: mx.array) -> mx.array:
        return function(*arguments)

    @run.vjp
    def run_vjp(
        primals: mx.array | tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> mx.array | tuple[mx.array, ...]:
        single = isinstance(primals, mx.array)
        arguments = (primals,) if single else tuple(primals)
        gradients = []
        for number in range(len(arguments)):
            own = mx.depends(list(arguments), [cotangent])  # for each argument anew, so that they share nothing

            def of_one(x: mx.array, own: list[mx.array] = own, number: int = number) -> mx.array:
                return function(*own[:number], x, *own[number + 1 :])

            gradients += mx.vjp(of_one, [own[number]], [cotangent])[1]
        return gradients[0] if single else tuple(gradients)

    return run
