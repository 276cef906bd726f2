"""Embeddings: a sum of tables, scaled, normed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from finite_differences import assert_module_follows, randomized

from mlxlm.layers import (
    BinaryPositionsSpec,
    BlockPositionsSpec,
    EmbeddingsSpec,
    LayerNormSpec,
    LearnedPositionsSpec,
    NormalizedPositionsSpec,
    SinusoidalPositionsSpec,
    TokenPositions,
)

TOKENS = mx.array([[3, 1, 4], [1, 5, 9]])


def test_token_position_and_type_are_added_then_normed():
    spec = EmbeddingsSpec(
        vocab_size=11,
        dim=4,
        positions=LearnedPositionsSpec(num_positions=8, dim=4, first=2),
        num_token_types=2,
        scale=1.5,
        norm=LayerNormSpec(dim=4),
    )
    module = randomized(spec.build())
    types = mx.array([[0, 1, 1], [0, 0, 1]])
    token, position, kind = (
        np.array(t) for t in (module.token.weight, module.position.weight, module.token_type.weight)
    )
    total = 1.5 * token[np.array(TOKENS)] + position[[5, 6, 7]] + kind[np.array(types)]
    centred = total - total.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * np.array(module.norm.weight) + np.array(module.norm.bias)
    assert np.abs(np.array(module(TOKENS, TokenPositions(3, 3), types)) - expected).max() < 1e-5


def test_absent_token_types_are_type_zero():
    module = randomized(EmbeddingsSpec(vocab_size=11, dim=4, num_token_types=3).build())
    zeros = mx.zeros(TOKENS.shape, dtype=mx.int32)
    assert mx.array_equal(module(TOKENS, TokenPositions(3)), module(TOKENS, TokenPositions(3), zeros))


def test_vectors_stand_in_for_the_table():
    module = randomized(EmbeddingsSpec(vocab_size=11, dim=4, scale=3.0).build())
    vectors = module.token(TOKENS)
    assert mx.array_equal(module(TOKENS, TokenPositions(3), vectors=vectors), module(TOKENS, TokenPositions(3)))


def test_positions_without_weights_keep_the_dtype():
    module = EmbeddingsSpec(vocab_size=11, dim=4, positions=SinusoidalPositionsSpec(dim=4)).build()
    module.set_dtype(mx.bfloat16)
    assert module(TOKENS, TokenPositions(3)).dtype == mx.bfloat16


def test_the_scale_is_rounded_to_the_dtype_first():
    module = EmbeddingsSpec(vocab_size=11, dim=4, scale=3072**0.5).build()
    module.set_dtype(mx.bfloat16)
    expected = module.token(TOKENS) * mx.array(55.5, dtype=mx.bfloat16)
    assert mx.array_equal(module(TOKENS, TokenPositions(3)), expected)


BLOCKS = np.array([[0, 1, 2], [0, 0, 1]])
ADDED = {
    "learned": (LearnedPositionsSpec(num_positions=8, dim=4, first=2), lambda w: w["position.weight"][[5, 6, 7]]),
    "block": (
        BlockPositionsSpec(num_positions=8, dim=4),
        lambda w: w["position.text.weight"][[3, 4, 5]] + w["position.block.weight"][BLOCKS],
    ),
    "normalised": (NormalizedPositionsSpec(dim=4, length=9), lambda w: np.array([3, 4, 5])[:, None] / 8),
    "binary": (BinaryPositionsSpec(dim=4), lambda w: np.array([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0]])),
    "sinusoidal": (
        SinusoidalPositionsSpec(dim=4),
        lambda w: np.array([[np.sin(p), np.cos(p), np.sin(p / 100), np.cos(p / 100)] for p in (3, 4, 5)]),
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_gradients_of_every_table_follow_the_formula(name):
    spec, added = ADDED[name]
    types = np.array([[0, 1, 1], [0, 0, 1]])
    module = randomized(
        EmbeddingsSpec(
            vocab_size=11, dim=4, positions=spec, num_token_types=2, scale=1.5, norm=LayerNormSpec(dim=4)
        ).build()
    )

    def formula(w):
        total = 1.5 * w["token.weight"][np.array(TOKENS)] + added(w) + w["token_type.weight"][types]
        centred = total - total.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return normed * w["norm.weight"] + w["norm.bias"]

    places = TokenPositions(3, 3, blocks=mx.array(BLOCKS))
    assert_module_follows(module, lambda m: m(TOKENS, places, mx.array(types)), formula)
