"""Linear biases: slopes as the paper gives them, scores as the slopes say."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from finite_differences import normal

from mlxlm.errors import ConfigError
from mlxlm.kernels import AttentionMask, attention
from mlxlm.layers import AlibiSpec, alibi_slopes


def slopes_of_the_paper(n):
    """The recursion in the paper's code: a power of two, or the closest one below and every other one of the next."""
    if n & (n - 1) == 0:
        start = 2 ** (-(2 ** -(np.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    below = 1 << (n.bit_length() - 1)
    return slopes_of_the_paper(below) + slopes_of_the_paper(2 * below)[0::2][: n - below]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 8, 12, 16, 20, 71, 112])
def test_slopes_of_any_number_of_heads(num_heads):
    assert np.allclose(alibi_slopes(num_heads), slopes_of_the_paper(num_heads), rtol=1e-6)


def test_the_paper_says_that_eight_heads_halve():
    assert np.array_equal(alibi_slopes(8), 0.5 ** np.arange(1, 9))


def test_another_exponent_ends_there():
    assert np.allclose(alibi_slopes(4, 5.0), 2.0 ** (-1.25 * np.arange(1, 5)))


@pytest.mark.parametrize(
    "spec", [AlibiSpec(num_heads=3), AlibiSpec(num_heads=3, divisor=2.5)], ids=["plain", "divided"]
)
def test_scores_fall_with_the_distance(spec):
    query, key, value = (normal(1, 3, 6, 4, seed=s) for s in range(3))
    terms = spec.build().score_terms(6, 6, 0)
    arrays = [mx.array(a, dtype=mx.float32) for a in (query, key, value)]
    found = np.array(attention(*arrays, mask=AttentionMask(causal=True), **terms))
    distance = np.arange(6)[:, None] - np.arange(6)
    slopes = alibi_slopes(3)[:, None, None].astype(np.float64)
    scores = query @ key.swapaxes(-1, -2) / 2 - slopes * np.abs(distance) / spec.divisor
    weights = np.exp(np.where(distance >= 0, scores, -np.inf))
    assert np.abs(found - weights / weights.sum(-1, keepdims=True) @ value).max() < 1e-5


def test_rounded_terms_are_bfloat16_products_with_the_keys_position():
    terms = AlibiSpec(num_heads=12, divisor=2.0, rounded=True).build().score_terms(1, 300, 299)
    bias = np.array(terms["bias"])
    assert bias.shape == (1, 12, 1, 300)

    def rounded(x):
        return mx.array(x, dtype=mx.float32).astype(mx.bfloat16).astype(mx.float32).item()

    for head, slope in enumerate(alibi_slopes(12)):
        for key in (0, 1, 37, 299):
            assert bias[0, head, 0, key] == rounded(rounded(float(slope)) * rounded(key)) / 2


def test_rounding_changes_nothing_where_nothing_has_to_be_rounded():
    arrays = [mx.array(normal(1, 4, 6, 4, seed=s), dtype=mx.float32) for s in range(3)]
    mask = AttentionMask(causal=True)
    plain, rounded = (
        attention(*arrays, mask=mask, **AlibiSpec(num_heads=4, rounded=flag).build().score_terms(6, 6, 0))
        for flag in (False, True)
    )
    assert mx.allclose(plain, rounded, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="at least one head, not 0"):
        AlibiSpec(num_heads=0)
    with pytest.raises(ConfigError, match="must be positive, not 0"):
        AlibiSpec(num_heads=2, divisor=0.0)
