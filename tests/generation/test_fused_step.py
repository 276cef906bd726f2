"""Fused decoding steps, their kernels on the emulator, give the logits of the whole; other models take other forms."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlxlm import runtime
from mlxlm.generation.stepping import FusedStep, Stepping, decoding_cache, make_step
from mlxlm.kernels.one_token import source
from mlxlm.layers import CacheSpec
from mlxlm.models.loading import load_model
from mlxlm.peft import METHODS, activate, apply
from tools.metal_emulator import compiler, emulated_metal

pytestmark = pytest.mark.skipif(compiler.compiler() is None, reason="needs Linux and g++ or clang++")


class Device:
    """The emulated GPU: `on` makes it the device of steps that are made or run inside."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.metal = None

    def run(self, function, *arguments):
        with self.monkeypatch.context() as patch, emulated_metal() as self.metal:
            patch.setattr(runtime, "backend", lambda: "metal")
            source.kernel.cache_clear()
            result = function(*arguments)
            source.kernel.cache_clear()
            return result


@pytest.fixture
def device(monkeypatch):
    """Without mx.compile, whose kernels a C++ compiler would make."""
    mx.disable_compile()
    yield Device(monkeypatch)
    mx.enable_compile()


def tokens_of(model, rows=1):
    return mx.array(np.random.default_rng(0).integers(5, model.config.embeddings.vocab_size, (rows, 14)))


def check(model, device, tolerance=2e-4):
    """Steps over the second half of a text; returns how many kernels the last one ran."""
    model.eval()
    model.join_projections()
    tokens = tokens_of(model)
    wanted = np.array(model(tokens))
    step = device.run(FusedStep, model)
    assert step.fused is not None, step.reason
    cache = model.make_cache(CacheSpec(ragged=True))
    model.hidden(tokens[:, :10], cache=cache)
    for place in range(10, 14):
        logits = device.run(step, tokens[:, place], cache)
        np.testing.assert_allclose(np.array(logits), wanted[:, place], atol=tolerance)
    assert cache.length == 14
    cache.trim(12)
    np.testing.assert_allclose(np.array(device.run(step, tokens[:, 12], cache)), wanted[:, 12], atol=tolerance)
    return len(device.metal.dispatches)


@pytest.mark.parametrize(
    ("name", "each", "head"),
    [
        ("llama", 5, True),
        ("qwen3", 6, True),
        ("gemma2", 5, False),
        ("chatglm", 5, True),
    ],
)
def test_a_fused_step_gives_the_logits_of_the_whole(fixture_model, device, name, each, head):
    model = load_model(fixture_model(name))
    assert check(model, device) == each * len(model.decoder.layers) + head


def test_of_quantized_weights_too(tiny_llama, device):
    nn.quantize(tiny_llama, group_size=32, bits=4)
    check(tiny_llama, device)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "not a multiple of 4"),
        ("qwen2", "heads of 6 features"),
        ("falcon", "ParallelBlock"),
        ("llama-dynamic", "rotary"),
        ("mpt-clipped", "clipped"),
        ("glm4", None),
    ],
)
def test_what_the_kernels_do_not_serve_is_said_and_takes_another_form(fixture_model, device, name, words):
    model = load_model(fixture_model(name))
    model.join_projections()
    step = device.run(FusedStep, model)
    if words is not None:
        assert step.fused is None
        assert words in step.reason
    tokens = tokens_of(model)
    wanted = np.array(model(tokens))
    cache = model.make_cache(CacheSpec(ragged=True))
    model.hidden(tokens[:, :13], cache=cache)
    np.testing.assert_allclose(np.array(device.run(step, tokens[:, 13], cache)), wanted[:, 13], atol=2e-4)


def test_weights_and_biases_that_were_changed_after_joining_are_the_ones_that_step(device):
    model = built(attention_bias=True)
    model.join_projections()
    model.update(tree_map(lambda array: 1.5 * array, model.parameters()))
    check(model, device)
    for layer in model.decoder.layers:
        layer.attention.query.bias = layer.attention.query.bias + 1
    stale = device.run(FusedStep, model)
    assert stale.fused is None
    assert "not joined" in stale.reason
    check(model, device)


@pytest.mark.parametrize("method", ["lora", "houlsby", "pfeiffer", "parallel-adapter", "ia3", "bitfit"])
def test_adapters_step_too_whatever_the_form(device, method):
    model = built(attention_bias=True)
    make_step(model)  # joins what reads the same input, before there is an adapter
    apply(model, METHODS[method]())
    model.update(tree_map(lambda array: array + 0.1, model.trainable_parameters()))
    tokens = tokens_of(model)
    for names in ("default", None):
        activate(model, names)
        wanted = np.array(model.eval()(tokens))
        for compiled in ("pieces", "fused"):
            step = device.run(make_step, model, Stepping(compiled=compiled))
            cache = model.make_cache(CacheSpec(ragged=True))
            model.hidden(tokens[:, :13], cache=cache)
            np.testing.assert_allclose(np.array(device.run(step, tokens[:, 13], cache)), wanted[:, 13], atol=2e-4)


def test_a_norm_in_another_dtype_has_no_kernels(device):
    model = built(model_type="glm4", head_dim=16, partial_rotary_factor=0.5)
    model.set_dtype(mx.float16)
    model.join_projections()
    assert device.run(FusedStep, model).fused is not None
    norm = model.decoder.layers[1].feed_forward_residual.norm_out
    norm.weight = norm.weight.astype(mx.float32)
    assert "norm" in device.run(FusedStep, model).reason


def test_several_rows_and_other_caches_take_another_form(tiny_llama, device):
    model = tiny_llama
    model.join_projections()
    step = device.run(FusedStep, model)
    for rows, spec in ((2, CacheSpec(ragged=True)), (1, CacheSpec(bits=8, group_size=32))):
        tokens = tokens_of(model, rows)
        cache = model.make_cache(spec)
        model.hidden(tokens[:, :13], cache=cache)
        logits = np.array(step(tokens[:, 13], cache))
        np.testing.assert_allclose(logits, np.array(model(tokens))[:, 13], atol=2e-4 if spec.ragged else 0.1)


def test_the_cpu_has_no_such_kernels(tiny_llama):
    step = make_step(tiny_llama, Stepping(compiled="fused"))
    assert step.fused is None
    assert "GPU" in step.reason
    assert decoding_cache(tiny_llama, stepping=Stepping(compiled="fused")).length == 0


@pytest.fixture
def tiny_llama():
    """Two layers that can be quantized in groups of 32."""
    return built()


def built(**more):
    from mlxlm.models import Transformer
    from mlxlm.models.families import family_of

    mx.random.seed(0)
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 120,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        **more,
    }  # fmt: skip
    return Transformer(family_of(config).read_config(config)).eval()
