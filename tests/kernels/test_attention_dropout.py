"""The dropout hash: its rate, its independence, and that it never stores a mask."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from attention_oracle import inputs, kept, relative_error

from mlxlm.kernels import attention
from mlxlm.kernels.attention.dropout import keep_mask

B, H, L = 2, 3, 256
KEY = mx.random.key(7)


def bits(key: mx.array = KEY, rate: float = 0.25) -> np.ndarray:
    return np.array(keep_mask(key, rate, B, H, (0, L), (0, L)))


def test_bits_are_those_of_the_formula():
    got = bits()
    rng = np.random.default_rng(0)
    for b, h, q, k in rng.integers(0, (B, H, L, L), size=(200, 4)):
        assert got[b, h, q, k] == kept(np.array(KEY), 0.25, int(b), int(h), int(q), int(k), H)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_weights_is_the_rate(rate):
    dropped = 1.0 - bits(rate=rate)
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(dropped.mean() - rate) < 4 * deviation / dropped.size**0.5
    for axis in range(2, 4):  # no row and no column is systematically off
        shares = dropped.mean(axis)
        assert np.abs(shares - rate).max() < 6 * deviation / L**0.5


def test_neighbours_heads_batches_and_keys_are_uncorrelated():
    centred = bits(rate=0.5) - 0.5
    other = bits(mx.random.key(8), rate=0.5) - 0.5
    flipped = bits(KEY[::-1], rate=0.5) - 0.5
    pairs = {
        "next key": (centred[..., 1:], centred[..., :-1]),
        "next query": (centred[:, :, 1:], centred[:, :, :-1]),
        "diagonal": (centred[:, :, 1:, 1:], centred[:, :, :-1, :-1]),
        "next head": (centred[:, 1:], centred[:, :-1]),
        "next batch row": (centred[1], centred[0]),
        "another seed": (centred, other),
        "words of the seed exchanged": (centred, flipped),
        "transposed": (centred, centred.swapaxes(-1, -2)),
        "power-of-two distance": (centred[..., 128:], centred[..., :-128]),
    }
    for name, (a, b) in pairs.items():
        correlation = float((a * b).mean()) / 0.25
        assert abs(correlation) < 5 / a.size**0.5, name


def test_blocks_see_the_bits_of_the_whole():
    whole = keep_mask(KEY, 0.3, B, H, (0, 20), (0, 30))
    assert mx.array_equal(keep_mask(KEY, 0.3, B, H, (7, 13), (11, 30)), whole[:, :, 7:13, 11:])


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_the_expected_output_is_that_without_dropout(implementation):
    arrays = inputs(L=3, S=12)
    exact = attention(**arrays, implementation="reference")
    mean = sum(
        attention(**arrays, dropout=0.2, dropout_key=key, implementation=implementation)
        for key in mx.random.split(mx.random.key(0), 400)
    )
    assert relative_error(mean / 400, exact) < 0.1


def test_a_dropout_of_zero_needs_no_key_and_changes_nothing():
    arrays = inputs()
    assert mx.array_equal(attention(**arrays, dropout=0.0), attention(**arrays))
