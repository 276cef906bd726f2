"""Activations whose gradients come from their arguments alone: the same gradients, and nothing kept in between."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.layers import feed_forward
from mlxlm.layers.activations import ACTIVATION_NAMES, activation, sparing
from mlxlm.layers.feed_forward import FeedForwardSpec


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_gradients_are_those_of_the_plain_function(name):
    mx.random.seed(1)
    gate, up, weight = (mx.random.normal((3, 7)) for _ in range(3))
    act = activation(name)

    def gated(gate, up):
        return act(gate) * up

    for function, arguments in ((act, (gate,)), (gated, (gate, up))):
        numbers = tuple(range(len(arguments)))

        def loss(*arguments, function=function):
            return (function(*arguments) * weight).sum()

        expected = mx.value_and_grad(loss, argnums=numbers)(*arguments)
        spare = sparing(function)
        got = mx.value_and_grad(lambda *a, spare=spare: (spare(*a) * weight).sum(), argnums=numbers)(*arguments)
        assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
        for one, two in zip(got[1], expected[1], strict=True):
            np.testing.assert_allclose(np.array(one), np.array(two), rtol=1e-5, atol=1e-6)


def compiled_operations(function, gate, up) -> str:
    """The graph of a compiled gradient."""
    step = mx.compile(lambda gate, up: mx.grad(lambda g, u: function(g, u).square().sum(), argnums=(0, 1))(gate, up))
    path = "graph.dot"
    mx.export_to_dot(path, *step(gate, up))
    with open(path) as file:
        return file.read()


def test_a_compiled_step_writes_out_nothing_between_arguments_and_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    silu = activation("silu")
    gate, up = mx.ones((4, 4)), mx.ones((4, 4))
    mx.eval(gate, up)

    def gated(gate, up):
        return silu(gate) * up

    lone = r'label ="(Sigmoid|CompiledSigmoidMultiply|Multiply)"'
    assert re.search(lone, compiled_operations(gated, gate, up)), "else this test says nothing"
    assert not re.search(lone, compiled_operations(sparing(gated), gate, up))


def test_feed_forward_layers_use_them_in_training_on_gpus(monkeypatch):
    monkeypatch.setattr(feed_forward, "backend", lambda: "cuda")
    spec = FeedForwardSpec(dim=4, hidden_dim=6, activation="silu", gated=True)
    layer, x = spec.build(), mx.random.normal((2, 4))
    used = []
    trained = layer._trained
    layer._trained = lambda *arguments: used.append(len(arguments)) or trained(*arguments)
    training = layer.train()(x)
    assert used == [2]
    assert mx.allclose(training, layer.eval()(x), atol=1e-6).item()
    assert used == [2]
