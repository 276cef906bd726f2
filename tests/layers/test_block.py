"""Blocks: every placement of a norm is one formula."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from finite_differences import assert_module_follows, normal, randomized

from mlxlm.layers import (
    AttentionSpec,
    BlockSpec,
    FeedForwardSpec,
    LayerNormSpec,
    ParallelBlockSpec,
    ResidualSpec,
    RMSNormSpec,
    Scope,
    TokenPositions,
    deepnorm_scales,
)

LAYER, RMS = LayerNormSpec(dim=4, eps=0.01), RMSNormSpec(dim=4, eps=0.01)
ATTENTION = AttentionSpec(dim=4, num_heads=2, num_kv_heads=1, head_dim=2, causal=True)
FEED_FORWARD = FeedForwardSpec(dim=4, hidden_dim=6, activation="gelu_tanh")


def norm(w, name, x):
    if f"{name}.bias" in w:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.01) * w[f"{name}.weight"] + w[f"{name}.bias"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.01) * w[f"{name}.weight"]


PLACEMENTS = {
    "pre": (ResidualSpec(norm_in=LAYER), lambda w, x, f: x + f(norm(w, "norm_in", x))),
    "post": (ResidualSpec(norm_after=LAYER), lambda w, x, f: norm(w, "norm_after", x + f(x))),
    "sandwich": (
        ResidualSpec(norm_in=RMS, norm_out=RMS),
        lambda w, x, f: x + norm(w, "norm_out", f(norm(w, "norm_in", x))),
    ),
    "deepnorm": (ResidualSpec(norm_after=LAYER, alpha=2.3), lambda w, x, f: norm(w, "norm_after", 2.3 * x + f(x))),
    "from-normed": (
        ResidualSpec(norm_in=LAYER, from_normed=True, alpha=1.7),
        lambda w, x, f: 1.7 * norm(w, "norm_in", x) + f(norm(w, "norm_in", x)),
    ),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placements_of_norms_and_their_gradients(name):
    spec, formula = PLACEMENTS[name]
    module = randomized(spec.build())
    assert_module_follows(
        module, lambda m, x: m(x, mx.sin), lambda w, x: formula(w, x, np.sin), normal(2, 3, 4), tolerance=1e-3
    )


def test_deepnorm_scales_are_those_of_the_paper():
    assert deepnorm_scales(0, 8)["decoder"] == pytest.approx((2.0, 64**-0.25))
    assert deepnorm_scales(8, 0)["encoder"] == pytest.approx((2.0, 64**-0.25))
    both = deepnorm_scales(6, 6)
    assert both["encoder"] == pytest.approx((0.81 * 6 ** (5 / 16), 0.87 * 6 ** (-5 / 16)))
    assert both["decoder"] == pytest.approx((18**0.25, 72**-0.25))


def parts(block, scope):
    return (lambda h: block.attention(h, scope)), block.feed_forward


def test_a_block_is_attention_then_feed_forward():
    residual = ResidualSpec(norm_in=LAYER)
    spec = BlockSpec(
        attention=ATTENTION,
        attention_residual=residual,
        feed_forward=FEED_FORWARD,
        feed_forward_residual=residual,
    )
    block, scope = randomized(spec.build()), Scope(TokenPositions(5))
    attend, feed = parts(block, scope)
    x = mx.array(normal(2, 5, 4), dtype=mx.float32)
    h = x + attend(block.attention_residual.norm_in(x))
    assert mx.allclose(block(x, scope), h + feed(block.feed_forward_residual.norm_in(h)), atol=1e-5)


def test_cross_attention_stands_between():
    residual = ResidualSpec(norm_in=RMS)
    spec = BlockSpec(
        attention=ATTENTION,
        attention_residual=residual,
        feed_forward=FEED_FORWARD,
        feed_forward_residual=residual,
        cross_attention=ATTENTION,
        cross_attention_residual=residual,
    )
    block, scope = randomized(spec.build()), Scope(TokenPositions(3))
    attend, feed = parts(block, scope)
    x, memory = mx.array(normal(2, 3, 4), dtype=mx.float32), mx.array(normal(2, 6, 4), dtype=mx.float32)
    h = x + attend(block.attention_residual.norm_in(x))
    h = h + block.cross_attention(block.cross_attention_residual.norm_in(h), scope, None, memory)
    expected = h + feed(block.feed_forward_residual.norm_in(h))
    assert mx.allclose(block(x, scope, None, memory), expected, atol=1e-5)


@pytest.mark.parametrize("second", [None, RMS], ids=["one-norm", "two-norms"])
def test_a_parallel_block_feeds_both_from_its_input(second):
    spec = ParallelBlockSpec(attention=ATTENTION, feed_forward=FEED_FORWARD, norm=LAYER, feed_forward_norm=second)
    block, scope = randomized(spec.build()), Scope(TokenPositions(5))
    attend, feed = parts(block, scope)
    x = mx.array(normal(2, 5, 4), dtype=mx.float32)
    other = block.norm(x) if second is None else block.feed_forward_norm(x)
    assert mx.allclose(block(x, scope), x + attend(block.norm(x)) + feed(other), atol=1e-5)
