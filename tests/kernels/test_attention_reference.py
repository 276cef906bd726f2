"""The dense reference against float64 written out from the contract, gradients by finite differences of that."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from attention_oracle import MASKS, as_float64, attention64, inputs, modifiers, relative_error, split

from mlxlm.kernels import AttentionMask, attention

MODIFIERS = tuple(modifiers(1, 1, 1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_output_and_lse_match_float64(mask, modifier):
    arrays = inputs()
    arrays, options = split(arrays, modifiers(4, 5, 7)[modifier])
    described = MASKS[mask](5, 7)
    out, lse = attention(**arrays, **options, mask=described, implementation="reference", return_lse=True)
    expected_out, expected_lse = attention64(as_float64(arrays), described, options)
    assert relative_error(out, expected_out) < 1e-5
    assert relative_error(lse, expected_lse) < 1e-5


@pytest.mark.parametrize("mask", ["none", "causal-negative-offset", "everything"])
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_gradients_match_finite_differences_in_float64(mask, modifier):
    arrays = inputs(H=2, K=1, L=3, S=4, D=3, E=2)
    arrays, options = split(arrays, modifiers(2, 3, 4)[modifier])
    described = MASKS[mask](3, 4)
    rng = np.random.default_rng(0)
    out_weight, lse_weight = rng.normal(size=(2, 2, 3, 2)), rng.normal(size=(2, 2, 3))

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        out, lse = attention(**arrays, **options, mask=described, implementation="reference", return_lse=True)
        lse = mx.where(lse == mx.inf, 0.0, lse)
        return (out * mx.array(out_weight.astype(np.float32))).sum() + (
            lse * mx.array(lse_weight.astype(np.float32))
        ).sum()

    def loss64(arrays: dict[str, np.ndarray]) -> float:
        out, lse = attention64(arrays, described, options)
        return float((out * out_weight).sum() + (np.where(np.isinf(lse), 0.0, lse) * lse_weight).sum())

    gradients, exact = mx.grad(loss)(arrays), as_float64(arrays)
    for name in arrays:
        gradient = np.array(gradients[name]).astype(np.float64)
        for _ in range(3):
            direction = rng.normal(size=gradient.shape)
            step = 1e-5
            ahead = loss64(exact | {name: exact[name] + step * direction})
            behind = loss64(exact | {name: exact[name] - step * direction})
            slope = (ahead - behind) / (2 * step)
            assert abs(slope - float((gradient * direction).sum())) < 1e-4 * max(1.0, abs(slope)), name


def test_a_bias_of_minus_infinity_hides_keys_without_nan():
    arrays = inputs()
    bias = mx.where(mx.arange(7) < mx.array([[[[0]]], [[[3]]]]), 0.0, -mx.inf)
    mask = AttentionMask(key_lengths=mx.array([0, 3]))

    def loss(arrays, **options):
        return attention(**arrays, **options, implementation="reference").sum()

    for got, expected in zip(
        mx.grad(lambda arrays: loss(arrays, bias=bias))(arrays).values(),
        mx.grad(lambda arrays: loss(arrays, mask=mask))(arrays).values(),
        strict=True,
    ):
        assert relative_error(got, expected) < 1e-6
