"""AttentionMask: what it makes visible, what it knows without evaluating, what it rejects."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from attention_oracle import MASKS, visible

from mlxlm.errors import AttentionError
from mlxlm.kernels import AttentionMask

SIZES = [(5, 7), (7, 5), (1, 6), (6, 6), (1, 1)]


def brute_force(mask: AttentionMask, L: int, S: int) -> np.ndarray:
    return np.array([[[visible(mask, b, i, j, L, S) for j in range(S)] for i in range(L)] for b in range(2)])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_dense_matches_the_contract(name, size):
    mask = MASKS[name](*size)
    dense = mask.dense(2, *size)
    dense = np.ones((1, 1, *size), bool) if dense is None else np.array(dense)
    assert dense.shape[0] in (1, 2)
    assert dense.shape[1:] == (1, *size)
    np.testing.assert_array_equal(np.broadcast_to(dense[:, 0], (2, *size)), brute_force(mask, *size))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_intervals_and_segments_together_are_the_mask(name, size):
    mask, (L, S) = MASKS[name](*size), size
    low, high, prefix = (None if a is None else np.array(a) for a in mask.intervals(L, S))
    assert low.shape == high.shape
    key = np.arange(S)
    seen = (key >= low[..., None]) & (key < high[..., None])
    if prefix is not None:
        seen = seen | (key < prefix[:, None, None])
    if mask.query_segments is not None:
        seen = seen & (np.array(mask.query_segments)[:, :, None] == np.array(mask.key_segments)[:, None])
    np.testing.assert_array_equal(np.broadcast_to(seen, (2, L, S)), brute_force(mask, L, S))
    assert low.min() >= 0
    assert high.max() <= S


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_what_python_knows_is_true(name, size):
    mask, (L, S) = MASKS[name](*size), size
    expected = brute_force(mask, L, S)
    if mask.is_plain(L, S):
        assert expected.all()
    if mask.is_causal_lower_right(L, S):
        np.testing.assert_array_equal(expected[0], np.tri(L, S, S - L, dtype=bool))
        np.testing.assert_array_equal(expected[1], expected[0])
    if not mask.may_have_empty_rows(L, S):
        assert expected.any(-1).all()
    for start in range(0, L, 2):
        stop = min(start + 2, L)
        first, last = mask.key_range((start, stop), L, S)
        hidden = np.delete(expected[:, start:stop], np.s_[first:last], axis=-1)
        assert not hidden.any()


@pytest.mark.parametrize("name", MASKS)
def test_blocks_put_together_are_the_mask(name):
    L, S = 7, 9
    mask = MASKS[name](L, S)
    built = np.ones((2, L, S), bool)
    for rows in ((0, 3), (3, 7)):
        for keys in ((0, 4), (4, 9)):
            block = mask.dense_block(rows, keys, L, S)
            if block is not None:
                assert block.shape[1:] == (1, rows[1] - rows[0], keys[1] - keys[0])
                built[:, slice(*rows), slice(*keys)] = np.array(block)[:, 0]
    np.testing.assert_array_equal(built, brute_force(mask, L, S))


def test_plain_and_causal_calls_are_recognised():
    assert AttentionMask().is_plain(5, 7)
    assert AttentionMask(prefix_lengths=[1, 2]).is_plain(5, 7)
    assert AttentionMask(causal=True).is_plain(1, 7), "one query at the end sees every key"
    assert AttentionMask(causal=True, window=7).is_plain(1, 7)
    assert not AttentionMask(causal=True, window=6).is_plain(1, 7)
    assert AttentionMask(causal=True, query_offset=np.int64(6)).is_plain(1, 7)
    assert AttentionMask(window=7).is_plain(5, 7)
    assert not AttentionMask(window=6).is_plain(5, 7)
    assert AttentionMask(causal=True).is_causal_lower_right(5, 7)
    assert AttentionMask(causal=True, window=7).is_causal_lower_right(5, 7)
    assert not AttentionMask(causal=True, window=6).is_causal_lower_right(5, 7)
    assert not AttentionMask(causal=True, query_offset=1).is_causal_lower_right(5, 7)
    assert not AttentionMask().is_causal_lower_right(5, 7)


def test_packed_documents_have_no_empty_rows():
    ids = mx.array([[0, 0, 1, 1]])
    assert not AttentionMask(causal=True, query_segments=ids, key_segments=ids).may_have_empty_rows(4, 4)
    assert AttentionMask(causal=True, query_segments=ids, key_segments=ids + 0).may_have_empty_rows(4, 4)


def test_the_dense_mask_is_built_once_for_all_layers():
    mask = AttentionMask(causal=True, window=2)
    assert mask.dense(1, 4, 4) is mask.dense(1, 4, 4)
    assert mask.dense(1, 3, 4).shape == (1, 1, 3, 4)


def test_a_mask_made_outside_serves_inside_and_after_a_compiled_function():
    mask = AttentionMask(key_lengths=mx.array([3, 5]))
    compiled = mx.compile(lambda x: mx.where(mask.dense(2, 1, 7), x, 0.0).sum())
    x = mx.ones((2, 1, 1, 7))
    assert compiled(x).item() == 8
    assert mask.dense(2, 1, 7).sum().item() == 8
    assert compiled(2 * x).item() == 16


def test_arrays_of_a_compiled_function_can_be_in_a_mask():
    @mx.compile
    def count(offset: mx.array) -> mx.array:
        return AttentionMask(causal=True, query_offset=offset).dense(2, 1, 7).sum()

    assert count(mx.array([1, 2])).item() == 5
    assert count(mx.array([6, 0])).item() == 8


def test_description_and_representation_name_what_is_set():
    mask = AttentionMask(causal=True, window=4, key_lengths=[3, 4])
    assert mask.describe() == "causal+window 4+lengths"
    assert repr(mask) == "AttentionMask(causal=True, window=4, key_lengths=int32[2])"
    assert AttentionMask().describe() == "plain"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"window": True}, "window is True"),
        ({"key_lengths": 3}, r"key_lengths is int32\[\]; expected integers of shape \(B,\)"),
        ({"key_lengths": [[3]]}, r"expected integers of shape \(B,\)"),
        ({"key_lengths": mx.array([1.0])}, "key_lengths is float32"),
        ({"prefix_lengths": "abc"}, "prefix_lengths is a str"),
        ({"query_offset": mx.zeros((1, 2), mx.int32)}, "query_offset is int32"),
        ({"query_segments": mx.zeros((1, 4), mx.int32)}, "key_segments is missing"),
        ({"key_segments": mx.zeros((1, 4), mx.int32)}, "query_segments is missing"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_fields_are_rejected(fields, message):
    with pytest.raises(AttentionError, match=message):
        AttentionMask(**fields)


def test_arrays_that_do_not_fit_the_call_are_rejected():
    mask = AttentionMask(key_lengths=mx.array([1, 2, 3]))
    with pytest.raises(AttentionError, match=r"mask.key_lengths has shape \(3,\); expected \(2,\)"):
        mask.validate(2, 4, 4)
    mask = AttentionMask(query_segments=mx.zeros((1, 4)).astype(mx.int32), key_segments=mx.zeros((2, 5), mx.int32))
    mask.validate(2, 4, 5)
    with pytest.raises(AttentionError, match=r"mask.key_segments has shape \(2, 5\); expected \(2, 6\)"):
        mask.validate(2, 4, 6)
