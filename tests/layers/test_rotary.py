"""Rotary positions against complex multiplication, in one and in two dimensions."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from finite_differences import normal

from mlxlm.errors import ConfigError
from mlxlm.layers import (
    DynamicScalingSpec,
    LinearScalingSpec,
    LongScalingSpec,
    NoScalingSpec,
    ProportionalScalingSpec,
    Rotary2dSpec,
    RotarySpec,
    TokenPositions,
    WavelengthScalingSpec,
    YarnScalingSpec,
)

HEAD = 12


def turned(x, positions, inverse, layout, factor=1.0):
    """The first 2 * len(inverse) features of x (B, H, L, D), as complex numbers times exp(i * position * frequency)."""
    dim = 2 * len(inverse)
    first, second = (
        (slice(0, dim, 2), slice(1, dim, 2)) if layout == "interleaved" else (slice(dim // 2), slice(dim // 2, dim))
    )
    angles = np.asarray(positions)[:, None, :, None] * inverse
    z = (x[..., first] + 1j * x[..., second]) * factor * np.exp(1j * angles)
    out = x.copy()
    out[..., first], out[..., second] = z.real, z.imag
    return out


def both(module, query, key, positions):
    return [
        np.array(a)
        for a in module.rotate(mx.array(query, dtype=mx.float32), mx.array(key, dtype=mx.float32), positions)
    ]


WHERE = {
    "start": (TokenPositions(5), np.arange(5)[None]),
    "offset": (TokenPositions(5, 7), 7 + np.arange(5)[None]),
    "offset-by-row": (TokenPositions(5, mx.array([3, 20])), np.array([[3], [20]]) + np.arange(5)),
    "explicit": (
        TokenPositions(5, explicit=mx.array([[0, 1, 2, 0, 1], [9, 8, 7, 6, 40]])),
        np.array([[0, 1, 2, 0, 1], [9, 8, 7, 6, 40]]),
    ),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [HEAD, 8], ids=["whole", "partial"])
def test_pairs_of_features_turn_by_the_position(dim, layout, where):
    positions, numbers = WHERE[where]
    query, key = normal(2, 3, 5, HEAD), normal(2, 1, 5, HEAD)
    inverse = 700.0 ** (-np.arange(0, dim, 2) / dim)
    module = RotarySpec(dim=dim, base=700.0, layout=layout).build()
    for found, given in zip(both(module, query, key, positions), (query, key), strict=True):
        assert np.abs(found - turned(given, numbers, inverse, layout)).max() < 2e-5
    assert not module.parameters()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("explicit", [False, True])
def test_gradients_turn_back(layout, explicit):
    """A rotation's gradient is the inverse rotation of the cotangent."""
    positions = TokenPositions(5, explicit=mx.array([[3, 4, 5, 6, 7]])) if explicit else TokenPositions(5, 3)
    module = RotarySpec(dim=8, layout=layout).build()
    x, cotangent = normal(1, 2, 5, HEAD), normal(1, 2, 5, HEAD, seed=5)
    zeros = mx.zeros((1, 1, 5, HEAD))

    def loss(x):
        return (module.rotate(x, zeros, positions)[0] * mx.array(cotangent, dtype=mx.float32)).sum()

    found = np.array(mx.grad(loss)(mx.array(x, dtype=mx.float32)))
    inverse = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    assert np.abs(found - turned(cotangent, -(3 + np.arange(5))[None], inverse, layout)).max() < 2e-5


def test_scores_depend_on_the_distance_alone():
    module = RotarySpec(dim=HEAD).build()
    query, key = normal(1, 1, 1, HEAD), normal(1, 1, 1, HEAD, seed=2)
    scores = []
    for start in (0, 13, 400):
        turned_query, _ = both(module, query, key, TokenPositions(1, start + 6))
        _, turned_key = both(module, query, key, TokenPositions(1, start))
        scores.append((turned_query * turned_key).sum())
    assert np.ptp(scores) < 1e-4


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_two_coordinates_turn_two_parts_of_a_head(layout):
    module = Rotary2dSpec(dim=4, base=50.0, layout=layout).build()
    blocks = mx.array([[0, 0, 1, 2, 3], [0, 5, 6, 7, 8]])
    query, key = normal(2, 3, 5, HEAD), normal(2, 3, 5, HEAD, seed=3)
    inverse = 50.0 ** (-np.arange(0, 4, 2) / 4)
    found = both(module, query, key, TokenPositions(5, 2, blocks=blocks))
    for out, given in zip(found, (query, key), strict=True):
        first = turned(given[..., :4], 2 + np.arange(5)[None], inverse, layout)
        second = turned(given[..., 4:8], np.array(blocks), inverse, layout)
        assert np.abs(out - np.concatenate([first, second, given[..., 8:]], axis=-1)).max() < 2e-5
    without = both(module, query, key, TokenPositions(5, 2))[0]
    assert np.array_equal(without[..., 4:], query[..., 4:].astype(np.float32))


def test_gradients_turn_back_in_both_coordinates():
    module, blocks = Rotary2dSpec(dim=4, base=50.0).build(), mx.array([[0, 0, 1, 2, 3]])
    x, cotangent = normal(1, 2, 5, HEAD), normal(1, 2, 5, HEAD, seed=5)

    def loss(x):
        turned_key = module.rotate(mx.zeros((1, 1, 5, HEAD)), x, TokenPositions(5, 2, blocks=blocks))[1]
        return (turned_key * mx.array(cotangent, dtype=mx.float32)).sum()

    found, inverse = np.array(mx.grad(loss)(mx.array(x, dtype=mx.float32))), 50.0 ** (-np.arange(0, 4, 2) / 4)
    first = turned(cotangent[..., :4], -(2 + np.arange(5))[None], inverse, "half")
    second = turned(cotangent[..., 4:8], -np.array(blocks), inverse, "half")
    assert np.abs(found - np.concatenate([first, second, cotangent[..., 8:]], axis=-1)).max() < 2e-5


PLAIN = 100.0 ** (-np.arange(0, 8, 2) / 8)


def yarn(inverse, factor, original, fast=32.0, slow=1.0):
    """Written from Peng et al. 2023, equations 20 to 23, with rotations counted as original * frequency / 2 pi."""
    low = 8 * np.log(original / (fast * 2 * np.pi)) / (2 * np.log(100.0))
    high = 8 * np.log(original / (slow * 2 * np.pi)) / (2 * np.log(100.0))
    low, high = max(np.floor(low), 0), min(np.ceil(high), 7)
    stretched = np.clip((np.arange(4) - low) / max(high - low, 1e-3), 0, 1)
    return inverse / factor * stretched + inverse * (1 - stretched)


def by_wavelength(inverse, factor, low, high, original):
    """Written from the release of Llama 3.1: three ranges of wavelengths."""
    result = []
    for frequency in inverse:
        wavelength = 2 * np.pi / frequency
        blend = (original / wavelength - low) / (high - low)
        if wavelength < original / high:
            result.append(frequency)
        elif wavelength > original / low:
            result.append(frequency / factor)
        else:
            result.append((1 - blend) * frequency / factor + blend * frequency)
    return np.array(result)


SCALINGS = [
    (NoScalingSpec(), 0, PLAIN, 1.0),
    (LinearScalingSpec(factor=3.0), 0, PLAIN / 3, 1.0),
    (DynamicScalingSpec(factor=2.0, original_length=16), 16, PLAIN, 1.0),
    (
        DynamicScalingSpec(factor=2.0, original_length=16),
        40,
        (100.0 * (2.0 * 40 / 16 - 1) ** (8 / 6)) ** (-np.arange(0, 8, 2) / 8),
        1.0,
    ),
    (YarnScalingSpec(factor=4.0, original_length=64), 0, yarn(PLAIN, 4.0, 64), 0.1 * np.log(4) + 1),
    (YarnScalingSpec(factor=4.0, original_length=64, explicit_factor=0.7), 0, yarn(PLAIN, 4.0, 64), 0.7),
    (
        LongScalingSpec(
            short_factors=(1.0, 2.0, 3.0, 4.0), long_factors=(5.0, 6.0, 7.0, 8.0), original_length=16, factor=4.0
        ),
        16,
        PLAIN / [1, 2, 3, 4],
        np.sqrt(1 + np.log(4) / np.log(16)),
    ),
    (
        LongScalingSpec(
            short_factors=(1.0, 2.0, 3.0, 4.0), long_factors=(5.0, 6.0, 7.0, 8.0), original_length=16, factor=4.0
        ),
        17,
        PLAIN / [5, 6, 7, 8],
        np.sqrt(1 + np.log(4) / np.log(16)),
    ),
    (
        WavelengthScalingSpec(factor=8.0, low_factor=1.0, high_factor=4.0, original_length=64),
        0,
        by_wavelength(PLAIN, 8.0, 1.0, 4.0, 64),
        1.0,
    ),
    (ProportionalScalingSpec(proportion=0.5, factor=2.0), 0, np.concatenate([PLAIN[:2], [0, 0]]) / 2, 1.0),
]


@pytest.mark.parametrize(("scaling", "length", "expected", "factor"), SCALINGS, ids=lambda x: getattr(x, "kind", str)())
def test_scaled_frequencies_follow_their_papers(scaling, length, expected, factor):
    for given in (length, mx.array(length)):
        assert np.abs(np.array(scaling.inverse_frequencies(8, 100.0, given)) - expected).max() < 1e-6
    assert abs(scaling.attention_factor - factor) < 1e-9


def test_the_attention_factor_scales_what_turns():
    spec = RotarySpec(dim=8, base=100.0, scaling=YarnScalingSpec(factor=4.0, original_length=64))
    query, key = normal(1, 2, 5, HEAD), normal(1, 2, 5, HEAD, seed=4)
    inverse = np.array(spec.scaling.inverse_frequencies(8, 100.0), dtype=np.float64)
    expected = turned(query, np.arange(5)[None], inverse, "half", spec.scaling.attention_factor)
    for positions in (TokenPositions(5), TokenPositions(5, explicit=mx.arange(5)[None])):
        assert np.abs(both(spec.build(), query, key, positions)[0] - expected).max() < 2e-5


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="even, not 7"):
        RotarySpec(dim=7)
    with pytest.raises(ConfigError, match="even, not 3"):
        Rotary2dSpec(dim=3)
    with pytest.raises(ConfigError, match="'half' or 'interleaved', not 'quarter'"):
        RotarySpec(dim=8, layout="quarter")
