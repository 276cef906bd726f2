"""Caches grow, shrink and reorder without changing what they hold."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from finite_differences import normal

from mlxlm.errors import UsageError
from mlxlm.layers import Cache, KeyValueCache


def made(length, start=0):
    keys = mx.array(normal(2, 3, 700, 4), dtype=mx.float32)[:, :, start : start + length]
    return keys, 2 * keys


def test_what_goes_in_comes_out_over_many_blocks():
    cache, start = KeyValueCache(), 0
    for length in (1, 255, 1, 3, 300):
        keys, values = cache.update(*made(length, start))
        start += length
        assert cache.length == start
        assert mx.array_equal(keys, made(start)[0])
        assert mx.array_equal(values, made(start)[1])


def test_a_step_within_the_room_copies_nothing():
    cache = KeyValueCache()
    cache.update(*made(10))
    room = cache.keys[0].shape
    cache.update(*made(5, 10))
    assert cache.keys[0].shape == room


def test_room_stops_growing_where_nothing_will_come():
    cache = Cache(1)
    cache.bound(600)
    for start in range(0, 600, 50):
        cache[0].update(*made(50, start))
    assert cache[0].capacity == 768
    cache[0].update(*made(100, 600))  # what nobody expected has room too
    assert cache[0].capacity == 768


def test_trimming_forgets_the_end():
    cache = Cache(2)
    for layer in cache:
        layer.update(*made(9))
    cache.trim(4)
    assert cache.length == 4
    keys, _ = cache[1].update(*made(2, 100))
    assert np.array_equal(np.array(keys), np.concatenate([made(4)[0], made(2, 100)[0]], axis=2))
    with pytest.raises(UsageError, match="a cache of 4 tokens can't be cut to 5"):
        Cache.trim(_of_length(4), 5)


def _of_length(length):
    cache = Cache(1)
    cache[0].update(*made(length))
    return cache


def test_rows_are_taken_in_any_order():
    cache = Cache(1)
    cache[0].update(*made(5))
    cache[0].memory = made(3)
    cache.take(mx.array([1, 1, 0]))
    keys, _ = cache[0].update(*(mx.concatenate([a, a[:1]]) for a in made(1, 50)))
    assert mx.array_equal(keys[:, :, :5], made(5)[0][mx.array([1, 1, 0])])
    assert mx.array_equal(cache[0].memory[1], made(3)[1][mx.array([1, 1, 0])])


def test_bytes_and_arrays_are_counted():
    cache = _of_length(5)
    assert len(cache) == 1
    assert cache.nbytes == sum(array.nbytes for array in cache.arrays()) == 2 * 2 * 3 * 256 * 4 * 4
