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
