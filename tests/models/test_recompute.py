"""Layers that are computed again for their gradients give the same gradients, everywhere."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm import peft, runtime
from mlxlm.models import Transformer, family_of, load_model, transformer

TOKENS = mx.array([[5, 9, 13, 7, 21], [8, 21, 3, 3, 6]])
LENGTHS = mx.array([5, 3])
NAMES = ["t5", "umt5", "llama", "gpt2", "roberta-sequence", "modernbert", "qwen3"]


def gradients(model, count, training=False):
    """Loss and gradients by name, with `count` layers computed again."""
    model.recompute_layers(count)
    model.train(training)
    mx.random.seed(11)
    keywords = {"decoder_tokens": TOKENS[:, :4]} if model.config.has_memory else {}

    def loss(parameters):
        model.update(parameters)
        return model(TOKENS, key_lengths=LENGTHS, **keywords).square().mean()

    parameters = model.trainable_parameters()
    value, slopes = mx.value_and_grad(loss)(parameters)
    model.update(parameters)
    return value.item(), {name: np.array(array) for name, array in tree_flatten(slopes)}


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same(name, count, fixture_model):
    model = load_model(fixture_model(name))
    value, slopes = gradients(model, 0)
    again, others = gradients(model, count)
    assert again == pytest.approx(value, rel=1e-6)
    for key, slope in slopes.items():
        assert np.abs(others[key] - slope).max() <= 1e-5 * max(np.abs(slope).max(), 1e-3), key
    if name == "t5":
        assert np.abs(slopes["encoder.positions.weight"]).max() > 0


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_dropout_is_the_same_in_both_computations(name, fixture_model):
    """With dropout the gradient of a recomputed layer fits the value only if the same units were dropped."""
    model = load_model(fixture_model(name))
    _, slopes = gradients(model, 5, training=True)
    parameters = dict(tree_flatten(model.trainable_parameters()))
    key = "decoder.layers.0.feed_forward.down.weight"
    draw = mx.random.normal(parameters[key].shape, key=mx.random.key(0))
    values = []
    for step in (1e-3, -1e-3):
        model.update(tree_unflatten([(key, parameters[key] + step * draw)]))
        values.append(gradients(model, 5, training=True)[0])
    slope = (np.array(draw) * slopes[key]).sum()
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=3e-2)


def test_the_random_state_goes_on(fixture_model):
    model = load_model(fixture_model("gpt2"))
    gradients(model, 5, training=True)
    first = mx.random.uniform().item()
    model.recompute_layers(5)
    assert mx.random.uniform().item() != first
    before = gradients(model, 5, training=True)[0]
    assert gradients(model, 5, training=True)[0] == before


def test_parameters_are_arrays_again_afterwards(fixture_model):
    model = load_model(fixture_model("t5"))
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    gradients(model, 5)
    after = dict(tree_flatten(model.parameters()))
    assert sorted(before) == sorted(after)
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)


def peak(layers: int, adapters: bool = True) -> int:
    """The less of two measurements, since other work on the machine can make a peak larger but never smaller."""
    return min(one_peak(layers, adapters) for _ in range(2))


def one_peak(layers: int, adapters: bool) -> int:
    """Bytes that the gradient of low-rank adapters, or of all weights, takes at its peak, in a model of wide
    feed-forward layers."""
    values = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 2048,
        "num_hidden_layers": layers, "num_attention_heads": 1, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }  # fmt: skip
    model = Transformer(family_of(values).read_config(values))
    if adapters:
        peft.apply(model, peft.Lora(rank=1, targets=("all-linear",)))
    model.train()
    model.recompute_layers(layers)
    tokens = mx.zeros((1, WIDE), mx.int32)

    def loss(parameters):
        model.update(parameters)
        return model(tokens).square().mean()

    parameters = model.trainable_parameters()
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    # Joined as for the norm of a gradient: all of them are asked for at once, the first layer's first.
    gradients = mx.grad(loss)(parameters)
    joined = mx.concatenate([array.reshape(-1) for _, array in tree_flatten(gradients)])
    mx.reset_peak_memory()
    mx.eval(joined)
    return mx.get_peak_memory() - before


WIDE = 256


@pytest.mark.skipif(runtime.backend() != "cpu", reason="GPUs run ahead, so peaks of small steps say nothing")
def test_no_layer_keeps_its_activations_for_the_gradient_of_its_weights():
    array = WIDE * 2048 * 4
    limit = mx.set_memory_limit(1)  # MLX then waits for each operation, so that the clock can't change a peak
    try:
        growth = (peak(8) - peak(2)) / array
    finally:
        mx.set_memory_limit(limit)
    # One array more or less is the order of the moment.
    assert growth < 1.5, "6 layers more"


@pytest.mark.skipif(runtime.backend() != "cpu", reason="GPUs run ahead, so peaks of small steps say nothing")
def test_trained_matrices_take_less_than_with_mx_checkpoint(monkeypatch):
    array = WIDE * 2048 * 4
    limit = mx.set_memory_limit(1)
    try:
        ours = peak(2, adapters=False) / array
        monkeypatch.setattr(transformer, "recomputed", lambda function, *_, **__: mx.checkpoint(function))
        theirs = peak(2, adapters=False) / array
    finally:
        mx.set_memory_limit(limit)
    assert ours < theirs - 2
