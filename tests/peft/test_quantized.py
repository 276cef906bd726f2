"""QLoRA: low-rank changes of quantized weights, which stay as they are until they are merged."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

import mlxlm
from mlxlm import peft
from mlxlm.errors import UsageError
from mlxlm.models import Transformer, family_of, load_model

CONFIG = {
    "model_type": "llama", "vocab_size": 41, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = mx.array(np.random.default_rng(0).integers(3, 40, (2, 9)))


def network(seed=1):
    mx.random.seed(seed)
    model = Transformer(family_of(CONFIG).read_config(CONFIG))
    model.update(tree_map(lambda a: 0.15 * mx.random.normal(a.shape), model.parameters()))
    return model


@pytest.fixture
def directory(tmp_path):
    """A checkpoint quantized to 4 bits in groups of 32."""
    model = network()
    nn.quantize(model, group_size=32, bits=4)
    mlxlm.save(model, None, tmp_path / "quantized", family="llama")
    return tmp_path / "quantized"


def with_adapter(directory, noise=0.05, quantized=True):
    model = load_model(directory, quantized=quantized)
    mx.random.seed(2)
    peft.apply(model, (peft.Qlora if quantized else peft.Lora)(rank=3, targets=("all-linear",)))
    mx.random.seed(3)
    model.update(tree_map(lambda a: a + noise * mx.random.normal(a.shape), model.trainable_parameters()))
    return model


def gradients(model):
    def loss(parameters):
        model.update(parameters)
        return model(TOKENS).square().mean()

    return {key: np.array(array) for key, array in tree_flatten(mx.grad(loss)(model.trainable_parameters()))}


def test_gradients_are_those_of_the_dequantized_model(directory):
    found, expected = (gradients(with_adapter(directory, quantized=quantized)) for quantized in (True, False))
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 2 * 7
    for key, array in found.items():
        assert np.abs(expected[key]).max() > 1e-7
        assert np.abs(array - expected[key]).max() < 1e-3 * np.abs(expected[key]).max(), key


def test_it_is_saved_and_loaded_onto_quantized_and_float_weights(directory, tmp_path):
    model = with_adapter(directory)
    expected = np.array(model(TOKENS))
    peft.save_adapter(model, tmp_path / "adapter")
    for quantized in (True, False):
        again = peft.load_adapter(load_model(directory, quantized=quantized), tmp_path / "adapter")
        assert np.abs(np.array(again(TOKENS)) - expected).max() < 1e-4
    assert np.abs(expected - np.array(load_model(directory)(TOKENS))).max() > 0.01


def test_merging_makes_floats_and_loses_nothing(directory, tmp_path):
    model = with_adapter(directory)
    expected = np.array(model(TOKENS))
    report = peft.merge(model)
    assert len(report.merged) == 2 * 7
    assert sorted(report.dequantized) == sorted(report.merged)
    assert (report.errors, report.worst, report.mean) == ({}, 0.0, 0.0)
    assert np.abs(np.array(model(TOKENS)) - expected).max() < 1e-4
    mlxlm.save(model, None, tmp_path / "merged")
    assert np.abs(np.array(load_model(tmp_path / "merged")(TOKENS)) - expected).max() < 1e-4


def affine(weight, group=32, bits=4):
    """Rows in groups, to the nearest of 2**bits even steps between their least and largest value, in float64."""
    groups = weight.reshape(weight.shape[0], -1, group)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    return (np.round((groups - low) / step) * step + low).reshape(weight.shape)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_bug_9_the_report_of_quantizing_again_measures_the_loss(noise, directory):
    model = with_adapter(directory, noise)
    path = "decoder.layers.1.feed_forward.up"
    adapted = model.decoder.layers[1].feed_forward.up
    base = adapted.base
    whole = np.array(mx.dequantize(base.weight, base.scales, base.biases, 32, 4), dtype=np.float64)
    part = adapted.adapters["default"]
    merged = whole + 16 / 3 * np.array(part.lora_b, dtype=np.float64) @ np.array(part.lora_a, dtype=np.float64)
    report = peft.merge(model, requantize=True)
    assert report.dequantized == ()
    assert sorted(report.errors) == sorted(report.merged)
    again = model.decoder.layers[1].feed_forward.up
    kept = np.array(mx.dequantize(again.weight, again.scales, again.biases, 32, 4), dtype=np.float64)
    change = np.linalg.norm(merged - whole)
    assert report.errors[path] == pytest.approx(np.linalg.norm(kept - merged) / change, rel=1e-3)
    # MLX places its steps a little otherwise, so that 0 is one of them.
    assert report.errors[path] == pytest.approx(np.linalg.norm(affine(merged) - merged) / change, rel=0.3)
    assert report.worst == max(report.errors.values())
    assert report.mean == pytest.approx(np.mean(list(report.errors.values())))


def test_quantized_weights_can_not_be_trained_as_a_whole(directory):
    for method in (peft.Full(), peft.LastLayers(num_layers=1), peft.Lora(modules_to_save=("head",))):
        with pytest.raises(UsageError, match="quantized"):
            peft.apply(load_model(directory, quantized=True), method)
