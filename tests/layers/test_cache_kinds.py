"""Every kind of cache gives attention what the mask says, however the tokens arrive."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from finite_differences import normal

from mlxlm.errors import UsageError
from mlxlm.kernels import AttentionMask, attention
from mlxlm.layers import Cache, CacheSpec, KeyValueCache, QuantizedStorage, WindowCache

LENGTH, HEADS, KV_HEADS, DIM = 300, 4, 2, 20


def drawn(batch=2, length=LENGTH):
    """Query, key, value (B, H, L, D)."""
    shapes = [(batch, h, length, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return [mx.array(normal(*shape, seed=i), dtype=mx.float32) for i, shape in enumerate(shapes)]


def fed(cache, chunks, mask, arrays, **options):
    """What a layer gives when the tokens come in chunks."""
    outs, start = [], 0
    for size in chunks:
        part = [array[:, :, start : start + size] for array in arrays]
        outs.append(cache.attend(*part, mask=mask, scale=DIM**-0.5, **options))
        start += size
    return np.array(mx.concatenate(outs, axis=2))


def expected(arrays, window=None, keep=0, slopes=None):
    """Dense float64 attention: a query sees its window and the first `keep` keys."""
    query, key, value = (np.array(a, dtype=np.float64) for a in arrays)
    key, value = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (key, value))
    places = np.arange(query.shape[2])
    distance = places[:, None] - places
    visible = distance >= 0
    if window is not None:
        visible &= (distance < window) | (places < keep)
    score = query @ key.swapaxes(-1, -2) * DIM**-0.5
    if slopes is not None:
        score = score - slopes[:, None, None] * distance
    score = np.where(visible, score, -np.inf)
    weights = np.exp(score - score.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ value


CHUNKS = [[LENGTH], [1] * LENGTH, [7] * 42 + [6], [290] + [1] * 10, [1, 120, 3, 100, 1, 75]]


@pytest.mark.parametrize("chunks", CHUNKS, ids=len)
@pytest.mark.parametrize("window", [1, 5, 64, 299, 400])
@pytest.mark.parametrize("keep", [0, 4])
def test_a_window_is_seen_whatever_the_chunks(monkeypatch, chunks, window, keep):
    monkeypatch.setattr(WindowCache, "block", 32)
    monkeypatch.setattr(WindowCache, "reserve_tokens", 8)
    arrays = drawn()
    found = fed(WindowCache(window, keep), chunks, AttentionMask(causal=True), arrays)
    np.testing.assert_allclose(found, expected(arrays, window, keep), atol=2e-6)


def test_a_window_holds_little(monkeypatch):
    monkeypatch.setattr(WindowCache, "block", 32)
    cache, arrays = WindowCache(16), drawn()
    fed(cache, [1] * LENGTH, AttentionMask(causal=True), arrays)
    assert cache.length == LENGTH
    assert cache.capacity <= 16 + 64 + 64


def test_a_window_takes_back_its_reserve_and_no_more():
    arrays = drawn(length=LENGTH)
    cache = WindowCache(16)
    cache.reserve_tokens, cache.block = 8, 32
    fed(cache, [1] * LENGTH, AttentionMask(causal=True), arrays)
    assert cache.can_trim(LENGTH - 8)
    assert not cache.can_trim(40)
    assert cache.can_trim(0)
    cache.trim(LENGTH - 8)
    part = [a[:, :, LENGTH - 8 :] for a in arrays]
    again = cache.attend(*part, mask=AttentionMask(causal=True, window=16), scale=DIM**-0.5)
    np.testing.assert_allclose(np.array(again), expected(arrays, 16)[:, :, -8:], atol=2e-6)
    whole = Cache([cache])
    with pytest.raises(UsageError, match="its window has moved on"):
        whole.trim(40)
    whole.trim(0)
    assert fed(cache, [LENGTH], AttentionMask(causal=True), arrays).shape[2] == LENGTH


@pytest.mark.parametrize("place", ["one", "each"])
@pytest.mark.parametrize("window", [None, 9])
def test_tokens_go_where_an_array_says(place, window):
    arrays, slopes = drawn(length=40), np.array([0.5, 0.25, 0.1, 0.0], dtype=np.float32)
    cache = KeyValueCache()
    outs = []
    for start, size in ((0, 30), (30, 1), (31, 4), (35, 5)):
        at = mx.array(start) if place == "one" else mx.array([start, start])
        mask = AttentionMask(causal=True, window=window, query_offset=at, at_keys=True)
        part = [array[:, :, start : start + size] for array in arrays]
        outs.append(cache.attend(*part, mask=mask, at=at, scale=DIM**-0.5, alibi_slopes=mx.array(slopes)))
    found = np.array(mx.concatenate(outs, axis=2))
    np.testing.assert_allclose(found, expected(arrays, window, slopes=slopes), atol=2e-6)
    assert cache.capacity == KeyValueCache.block


def test_rows_of_different_lengths_stand_side_by_side():
    arrays = drawn(length=30)
    cache = Cache([KeyValueCache()])
    lengths = [9, 14]
    cache[0].attend(*(a[:, :, :14] for a in arrays), mask=AttentionMask(causal=True), scale=DIM**-0.5)
    cache.advance(14, lengths)
    assert cache.row_lengths == lengths
    rows = [mx.stack([a[row, :, n : n + 6] for row, n in enumerate(lengths)]) for a in arrays]
    mask = AttentionMask(causal=True, query_offset=cache.slots, at_keys=True)
    found = np.array(cache[0].attend(*rows, mask=mask, at=cache.slots, scale=DIM**-0.5))
    cache.advance(6)
    wanted = expected(arrays)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(found[row], wanted[row, :, n : n + 6], atol=2e-6)
    cache.take([1])
    assert cache.row_lengths == [20]
    assert cache.slots is None


def test_caches_of_different_lengths_join():
    arrays = drawn(length=300)
    parts = []
    for row, n in enumerate((280, 12)):
        one = Cache([KeyValueCache()])
        one[0].attend(*(a[row : row + 1, :, :n] for a in arrays), mask=AttentionMask(causal=True), scale=1.0)
        parts.append(one)
    joined = Cache([KeyValueCache()])
    joined.join(parts)
    assert joined.row_lengths == [280, 12]
    rows = [mx.stack([a[row, :, n : n + 1] for row, n in enumerate((280, 12))]) for a in arrays]
    mask = AttentionMask(causal=True, query_offset=joined.slots, at_keys=True)
    found = np.array(joined[0].attend(*rows, mask=mask, at=joined.slots, scale=DIM**-0.5))
    for row, n in enumerate((280, 12)):
        np.testing.assert_allclose(found[row, :, 0], expected(arrays)[row, :, n], atol=2e-6)
    with pytest.raises(UsageError, match="ragged=True"):
        Cache([WindowCache(4)]).join([_held(WindowCache(4))])


def _held(layer):
    layer.attend(*drawn(length=3), mask=AttentionMask(causal=True), scale=1.0)
    return Cache([layer])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * 20 + [280], [20] * 15])
@pytest.mark.parametrize("window", [None, 33])
def test_attention_on_quantized_tiles_is_that_of_the_unpacked_values(bits, chunks, window):
    arrays, slopes = drawn(), mx.array([0.5, 0.25, 0.1, 0.0])
    storage = QuantizedStorage(bits, 32, tile=64)
    cache = KeyValueCache(storage) if window is None else WindowCache(window, storage=storage)
    found = fed(cache, chunks, AttentionMask(causal=True), arrays, alibi_slopes=slopes, softcap=None)
    held = [arrays[0], *(storage.unpack(storage.pack(a), a.dtype, DIM) for a in arrays[1:])]
    np.testing.assert_allclose(found, expected(held, window, slopes=np.array(slopes)), atol=1e-5)
    # The rounding itself: half a step of each group of 32 standard normal values.
    assert np.abs(found - expected(arrays, window, slopes=np.array(slopes))).mean() < {8: 0.005, 4: 0.09}[bits]


def test_relative_biases_and_soft_caps_meet_tiles():
    arrays = drawn(1, 70)
    table = mx.array(normal(HEADS, 139), dtype=mx.float32)
    storage = QuantizedStorage(8, 32, tile=16)
    held = [arrays[0], *(storage.unpack(storage.pack(a), a.dtype, DIM) for a in arrays[1:])]
    wanted = attention(*held, mask=AttentionMask(causal=True), relative_bias=table, softcap=3.0, scale=0.2)
    packed = [storage.pack(a) for a in arrays[1:]]
    options = {"scale": 0.2, "softcap": 3.0, "dim": DIM}
    whole = storage.attend(arrays[0], *packed, mask=AttentionMask(causal=True), relative_bias=table, **options)
    np.testing.assert_allclose(np.array(whole), np.array(wanted), atol=1e-5)
    last = storage.attend(
        arrays[0][:, :, -3:], *packed, mask=AttentionMask(causal=True), relative_bias=table[:, :72], **options
    )
    last_wanted = attention(
        arrays[0][:, :, -3:], *held[1:], mask=AttentionMask(causal=True), relative_bias=table[:, :72], scale=0.2,
        softcap=3.0,
    )  # fmt: skip
    np.testing.assert_allclose(np.array(last), np.array(last_wanted), atol=1e-5)


def test_a_window_survives_a_file():
    for keep in (0, 4):
        arrays = drawn()
        cache = WindowCache(16, keep)
        fed(cache, [200], AttentionMask(causal=True), [a[:, :, :200] for a in arrays])
        again = WindowCache(16, keep)
        again.fill(*cache.filled(), cache.length, cache.virtual)
        rest = [a[:, :, 200:] for a in arrays]
        found = fed(again, [3, 1, 1, 95], AttentionMask(causal=True), rest)
        np.testing.assert_allclose(found, expected(arrays, 16, keep)[:, :, 200:], atol=2e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 3}, "can't have bits 3; valid: 4, 8"),
        ({"bits": 8, "group_size": 48}, "can't have group_size 48; valid: 32, 64, 128"),
        ({"max_length": 4}, "a cache of 4 tokens has no room"),
        ({"max_length": 40, "ragged": True}, "can't be ragged"),
    ],
)
def test_a_bad_choice_is_one_clear_line(fields, words):
    with pytest.raises(UsageError, match=words):
        CacheSpec(**fields)


def test_a_choice_is_made_layer_by_layer():
    cache = CacheSpec(max_length=100).build([None, 16, 200])
    assert [type(layer) for layer in cache] == [WindowCache] * 3
    assert [(layer.window, layer.keep) for layer in cache] == [(96, 4), (16, 0), (96, 4)]
    assert [type(layer) for layer in CacheSpec().build([None, 16])] == [KeyValueCache, WindowCache]
    assert [type(layer) for layer in CacheSpec(ragged=True).build([None, 16])] == [KeyValueCache] * 2
    assert CacheSpec().held(None, 1000) == 1024
    assert CacheSpec().held(16, 1000) == 512
