"""Feed-forward layers: plain, and each member of the GLU family."""

from __future__ import annotations

import mlx.core as mx
import pytest
from finite_differences import assert_module_follows, normal, randomized
from test_activations import FORMULAS

from mlxlm.layers import FeedForwardSpec


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_plain(name, bias):
    module = randomized(FeedForwardSpec(dim=4, hidden_dim=7, activation=name, bias=bias).build())

    def formula(w, x):
        return linear(w, "down", FORMULAS[name](linear(w, "up", x)))

    assert_module_follows(module, lambda m, x: m(x), formula, normal(2, 3, 4))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("sigmoid", id="GLU"),
        pytest.param("identity", id="Bilinear"),
        pytest.param("relu", id="ReGLU"),
        pytest.param("gelu", id="GeGLU"),
        pytest.param("silu", id="SwiGLU"),
    ],
)
def test_gated(name):
    module = randomized(FeedForwardSpec(dim=4, hidden_dim=5, activation=name, gated=True, bias=True).build())

    def formula(w, x):
        return linear(w, "down", FORMULAS[name](linear(w, "gate", x)) * linear(w, "up", x))

    assert_module_follows(module, lambda m, x: m(x), formula, normal(2, 3, 4))


def test_hidden_features_are_dropped_in_training_only():
    module = randomized(FeedForwardSpec(dim=4, hidden_dim=64, activation="relu", dropout=0.5).build())
    x = mx.array(normal(1, 3, 4), dtype=mx.float32)
    still = module(x)
    assert mx.array_equal(module(x), still)
    module.train()
    assert not mx.array_equal(module(x), still)
