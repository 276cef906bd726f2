"""Activations against their formulas, and gradients of smooth ones against central differences."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import ConfigError
from mlxlm.layers import ACTIVATION_NAMES, activation

X = np.array([-9.0, -3.1, -1.0, -0.2, 0.07, 0.9, 2.5, 8.0])
sigmoid = np.vectorize(lambda x: 1 / (1 + math.exp(-x)))
FORMULAS = {
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "gelu": np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "squared_relu": lambda x: np.where(x > 0, x, 0.0) ** 2,
    "identity": lambda x: x,
}


def test_every_activation_is_tested():
    assert set(FORMULAS) == set(ACTIVATION_NAMES)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_values_and_gradients_follow_the_formula(name):
    formula, function = FORMULAS[name], activation(name)
    x = mx.array(X.astype(np.float32))
    assert np.abs(np.array(function(x)) - formula(X)).max() < 2e-6 * max(1.0, np.abs(formula(X)).max())
    gradient = np.array(mx.grad(lambda x: function(x).sum())(x))
    numeric = (formula(X + 1e-6) - formula(X - 1e-6)) / 2e-6
    assert np.abs(gradient - numeric).max() < 2e-5 * max(1.0, np.abs(numeric).max())


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'gelu_tanh'"):
        activation("gelu_tan")
