"""Position encodings that are added to the embeddings."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import ConfigError
from mlxlm.layers import (
    BinaryPositionsSpec,
    LearnedPositionsSpec,
    NormalizedPositionsSpec,
    SinusoidalPositionsSpec,
    TokenPositions,
)

EXPLICIT = mx.array([[4, 0, 9], [7, 7, 2]])


def test_sinusoids_follow_the_paper():
    found = np.array(SinusoidalPositionsSpec(dim=10, base=300.0).build()(TokenPositions(50)))
    assert found.shape == (1, 50, 10)
    for position in range(50):
        for pair in range(5):
            angle = position / 300.0 ** (2 * pair / 10)
            assert abs(found[0, position, 2 * pair] - np.sin(angle)) < 1e-5
            assert abs(found[0, position, 2 * pair + 1] - np.cos(angle)) < 1e-5


@pytest.mark.parametrize("shift", [1, 5, 31])
def test_a_shift_of_sinusoids_is_one_rotation_for_all_positions(shift):
    encoding = np.array(SinusoidalPositionsSpec(dim=12).build()(TokenPositions(64)), dtype=np.float64)[0]
    angles = shift * 10000.0 ** (-np.arange(6) / 6)
    rotation = np.zeros((12, 12))
    for pair, angle in enumerate(angles):
        # (sin(a + s), cos(a + s)) = [[cos s, sin s], [-sin s, cos s]] (sin a, cos a)
        rotation[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = [
            [np.cos(angle), np.sin(angle)],
            [-np.sin(angle), np.cos(angle)],
        ]
    assert np.abs(encoding[shift:] - encoding[:-shift] @ rotation.T).max() < 1e-5


def test_dot_products_of_sinusoids_depend_on_the_distance_alone():
    encoding = np.array(SinusoidalPositionsSpec(dim=16).build()(TokenPositions(40)), dtype=np.float64)[0]
    products = encoding @ encoding.T
    for distance in range(40):
        assert np.ptp(np.diagonal(products, distance)) < 1e-4


def test_normalized_positions_go_from_zero_to_one():
    encode = NormalizedPositionsSpec(dim=3).build()
    found = np.array(encode(TokenPositions(5)))
    assert np.allclose(found, np.repeat(np.array([0, 0.25, 0.5, 0.75, 1])[None, :, None], 3, axis=2))
    assert np.array_equal(np.array(encode(TokenPositions(1))), np.zeros((1, 1, 3)))
    # The step depends on the length, unless one is given.
    assert np.allclose(np.array(encode(TokenPositions(9)))[0, 1], 0.125)
    assert np.allclose(
        np.array(NormalizedPositionsSpec(dim=3, length=11).build()(TokenPositions(2, 4)))[0, :, 0], [0.4, 0.5]
    )


def test_binary_positions_count():
    found = np.array(BinaryPositionsSpec(dim=4).build()(TokenPositions(16)))[0]
    assert set(np.unique(found)) == {0.0, 1.0}
    assert np.array_equal(found @ [1, 2, 4, 8], np.arange(16))
    wide = np.array(BinaryPositionsSpec(dim=40).build()(TokenPositions(2, 2**20)))[0]
    assert wide.shape == (2, 40)
    assert np.array_equal(wide @ (2.0 ** np.arange(40)), [2**20, 2**20 + 1])


@pytest.mark.parametrize("first", [0, 2])
def test_learned_positions_are_rows_of_a_table(first):
    module = LearnedPositionsSpec(num_positions=12, dim=3, first=first).build()
    assert module.weight.shape == (12 + first, 3)
    assert mx.array_equal(module(TokenPositions(3, 5))[0], module.weight[5 + first : 8 + first])
    rows = mx.grad(lambda table: _with(module, table)(TokenPositions(3, 5)).sum())(module.weight)
    assert np.array_equal(np.array(rows)[:, 0], [5 + first <= row < 8 + first for row in range(12 + first)])


def _with(module, table):
    module.weight = table
    return module


@pytest.mark.parametrize(
    "spec",
    [
        SinusoidalPositionsSpec(dim=6),
        NormalizedPositionsSpec(dim=6, length=10),
        BinaryPositionsSpec(dim=6),
        LearnedPositionsSpec(num_positions=10, dim=6),
    ],
    ids=lambda spec: spec.kind(),
)
def test_offsets_and_explicit_positions_pick_the_same_vectors(spec):
    encode = spec.build()
    table = encode(TokenPositions(10))[0]
    assert mx.allclose(encode(TokenPositions(4, 3))[0], table[3:7], atol=1e-6)
    by_row = encode(TokenPositions(3, mx.array([1, 6])))
    assert mx.allclose(by_row, mx.stack([table[1:4], table[6:9]]), atol=1e-6)
    assert mx.allclose(encode(TokenPositions(3, explicit=EXPLICIT)), table[EXPLICIT], atol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="even, not 7"):
        SinusoidalPositionsSpec(dim=7)
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        NormalizedPositionsSpec(dim=2, length=0)
    assert BinaryPositionsSpec(dim=5).limit == 32
    assert SinusoidalPositionsSpec(dim=4).limit is None
