"""Norms against their papers' formulas, gradients included."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from finite_differences import assert_module_follows, normal, randomized

from mlxlm.layers import LayerNormSpec, NoNormSpec, RMSNormSpec, norms


def layer_norm(w, x, eps=0.01):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * w["weight"] + w.get("bias", 0.0)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias):
    module = randomized(LayerNormSpec(dim=5, eps=0.01, bias=bias).build())
    assert ("bias" in module) == bias
    assert_module_follows(module, lambda m, x: m(x), layer_norm, normal(2, 3, 5))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    module = randomized(RMSNormSpec(dim=5, eps=0.01, offset=offset).build())

    def formula(w, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.01) * (offset + w["weight"])

    assert_module_follows(module, lambda m, x: m(x), formula, normal(2, 3, 5))


def test_a_fresh_norm_scales_by_one():
    x = mx.array(normal(3, 7).astype(np.float32))
    plain, offset = RMSNormSpec(dim=7).build(), RMSNormSpec(dim=7, offset=1.0).build()
    assert mx.array_equal(offset.weight, mx.zeros(7))
    assert mx.allclose(plain(x), offset(x), atol=1e-6)


def test_an_offset_scale_is_multiplied_in_float32():
    module = RMSNormSpec(dim=64, offset=1.0).build()
    # 1 + 2^-9 is no bfloat16: adding in bfloat16 would lose it.
    module.weight = mx.full((64,), 2.0**-9, dtype=mx.bfloat16)
    x = mx.array(normal(1, 64).astype(np.float32)).astype(mx.bfloat16)
    exact = np.array(x.astype(mx.float32), dtype=np.float64)
    exact = exact / np.sqrt((exact**2).mean() + 1e-6) * (1 + 2.0**-9)
    assert module(x).dtype == mx.bfloat16
    assert mx.array_equal(module(x), mx.array(exact.astype(np.float32)).astype(mx.bfloat16))


def test_no_norm_passes_on_and_has_no_weights():
    module = NoNormSpec().build()
    x = mx.ones((2, 3))
    assert module(x) is x
    assert not module.parameters()


@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_a_frozen_scale_changes_no_gradient_of_the_input(on, monkeypatch):
    monkeypatch.setattr(norms, "backend", lambda: on)
    rng = np.random.default_rng(0)
    x, weights = (mx.array(rng.normal(size=(3, 5, 7)).astype(np.float32)) for _ in range(2))
    layer = RMSNormSpec(dim=7, eps=1e-3).build()
    layer.weight = mx.array(rng.uniform(0.5, 2, 7).astype(np.float32))

    def loss(x):
        return (layer(x) * weights).sum()

    one, first = mx.value_and_grad(loss)(x)
    layer.freeze()
    other, second = mx.value_and_grad(loss)(x)
    assert one.item() == other.item()
    assert mx.allclose(first, second, rtol=1e-5, atol=1e-6).item()
