"""Relative position buckets: as the paper defines them, for every offset, and differentiable."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import ConfigError
from mlxlm.kernels import AttentionMask, attention
from mlxlm.layers import RelativeBucketsSpec, relative_buckets

SIZES = [(32, 128), (8, 20), (7, 50), (64, 1000)]


def bucket(relative, num_buckets, max_distance, bidirectional):
    """One number from the definition, in exact enough arithmetic: key minus query -> bucket."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    ratio = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(exact + int(ratio * (num_buckets - exact) + 1e-6), num_buckets - 1)


@pytest.mark.parametrize(("num_buckets", "max_distance"), SIZES)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_follow_the_definition(num_buckets, max_distance, bidirectional):
    found = relative_buckets(max_distance, num_buckets, bidirectional)
    assert found.shape == (2 * max_distance + 1,)
    expected = [
        bucket(relative, num_buckets, max_distance, bidirectional)
        for relative in range(-max_distance, max_distance + 1)
    ]
    assert found.tolist() == expected


def test_each_near_distance_has_its_own_bucket_and_far_ones_share():
    both = relative_buckets(128, 32, True)[128:]  # keys after the query
    assert both[:8].tolist() == [0, 17, 18, 19, 20, 21, 22, 23]
    assert both[-1] == both[-20] == 31
    back = relative_buckets(128, 32, False)
    assert set(back[128:].tolist()) == {0}
    assert back[:128][::-1][:15].tolist() == list(range(1, 16))


def dense(weight, spec, query_length, key_length, offset):
    """(H, Lq, Lk) by looking every pair up."""
    table = np.zeros((spec.num_heads, query_length, key_length), np.float32)
    for i in range(query_length):
        for j in range(key_length):
            place = bucket(j - i - offset, spec.num_buckets, spec.max_distance, spec.bidirectional)
            table[:, i, j] = weight[place]
    return table


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("queries", "keys", "offset"), [(7, 7, 0), (1, 30, 29), (5, 23, 18), (3, 9, 2)])
@pytest.mark.parametrize("kind", ["int", "array"])
def test_scores_get_the_bias_of_their_distance(bidirectional, queries, keys, offset, kind):
    spec = RelativeBucketsSpec(num_heads=3, bidirectional=bidirectional, num_buckets=8, max_distance=13)
    module = spec.build()
    mx.random.seed(1)
    module.weight = mx.random.normal(module.weight.shape)
    query, key, value = (mx.random.normal((2, 3, length, 5)) for length in (queries, keys, keys))
    terms = module.score_terms(queries, keys, offset if kind == "int" else mx.array([offset]))
    assert terms["relative_bias"].shape == (3, queries + keys - 1)
    ours = attention(query, key, value, mask=AttentionMask(), **terms)
    bias = mx.array(dense(np.array(module.weight), spec, queries, keys, offset))
    theirs = attention(query, key, value, mask=AttentionMask(), bias=bias[None])
    assert mx.abs(ours - theirs).max().item() < 1e-5


def test_rows_with_offsets_of_their_own_get_each_its_bias():
    spec = RelativeBucketsSpec(num_heads=2, bidirectional=False, num_buckets=8, max_distance=13)
    module = spec.build()
    terms = module.score_terms(2, 9, mx.array([7, 3]))
    for row, offset in enumerate([7, 3]):
        expected = dense(np.array(module.weight), spec, 2, 9, offset)
        assert np.array_equal(np.array(terms["bias"][row]), expected)


def test_gradients_count_how_often_a_bucket_is_used():
    spec = RelativeBucketsSpec(num_heads=2, bidirectional=True, num_buckets=8, max_distance=13)
    module = spec.build()

    def total(weight):
        module.weight = weight
        return module.score_terms(4, 6, 0)["relative_bias"].sum()

    found = np.array(mx.grad(total)(module.weight))
    used = [bucket(relative, 8, 13, True) for relative in range(-3, 6)]
    assert found[:, 0].tolist() == [used.count(place) for place in range(8)]


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(2, 128), (32, 8), (0, 10)])
def test_sizes_without_room_for_ranges_are_refused(num_buckets, max_distance):
    with pytest.raises(ConfigError, match="leave no room"):
        RelativeBucketsSpec(num_heads=2, bidirectional=True, num_buckets=num_buckets, max_distance=max_distance)
