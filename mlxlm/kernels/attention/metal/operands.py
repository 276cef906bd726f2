"""What the kernels read besides query, key and value: masks and dropout keys as small integer arrays.

All of them are contiguous, in device memory, and linear in the lengths.
"""

from __future__ import annotations

import mlx.core as mx

from mlxlm.kernels.attention.launches import Part
from mlxlm.kernels.attention.mask import AttentionMask
from mlxlm.kernels.attention.problem import AttentionProblem

Arrays = dict[str, mx.array]

# MLX hands arrays of fewer than 8 elements to a kernel in `constant` memory, larger ones in `device` memory. One text
# can't have both, and a text that changed with the batch size would compile twice: so nothing is smaller than this.
_LEAST_ELEMENTS = 8

_BATCH_FIRST = ("row_bounds", "prefix", "query_segments", "key_segments", "query_offset")
_HEADS_FIRST = ("alibi_slopes", "relative_bias", "sinks")
_BATCH_HEADS_QUERIES = ("query", "out", "output_gradient", "lse", "lse_gradient", "delta", "bias")


def constant_arrays(problem: AttentionProblem, mask: AttentionMask, dropout_key: mx.array | None) -> Arrays:
    """The arrays of a mask and of dropout, by the names that the kernels use; only those that are needed.

    row_bounds (1 | B, Lq, 2): the keys low .. high - 1 that a query may see. prefix (1 | B,): keys below it are seen
    by all. query_segments (1 | B, Lq), key_segments (1 | B, Lk). query_offset (1 | B,): for ALiBi.
    dropout_key (2,) uint32.
    """
    arrays: Arrays = {}
    query_length, key_length = problem.query_length, problem.key_length
    if not mask.is_plain(query_length, key_length):
        low, high, prefix = mask.intervals(query_length, key_length)
        if prefix is not None:
            arrays["prefix"] = prefix
        if mask.query_segments is not None:
            arrays["query_segments"], arrays["key_segments"] = mask.query_segments, mask.key_segments
            first, last = segment_ranges(mask.query_segments, mask.key_segments)
            low, high = mx.maximum(low, first), mx.minimum(high, last + 1)
        arrays["row_bounds"] = _row_bounds(low, high, key_length)
    if problem.alibi:
        offset = mask.offset(query_length, key_length)
        arrays["query_offset"] = mx.array([offset], dtype=mx.int32) if isinstance(offset, int) else offset.reshape(-1)
    if dropout_key is not None and problem.dropout:
        arrays["dropout_key"] = dropout_key
    return arrays


def _row_bounds(low: mx.array, high: mx.array, key_length: int) -> mx.array:
    """Ranges of keys low .. high - 1, one array each, in one array (..., 2)."""
    # A query that sees nothing must not widen what its block sees: its range ends before every other begins.
    empty = low >= high
    return mx.stack([mx.where(empty, key_length, low), mx.where(empty, 0, high)], axis=-1)


def part_of(arrays: Arrays, part: Part, problem: AttentionProblem) -> Arrays:
    """The arrays of a call as those of the smaller call that a part of it is; dropout_key becomes dropout_words.

    dropout_words (8,): the key, and what numbers of the whole call the part's first row of the batch, first head, first
    query and first key have; in the middle the number of heads. See dropout.py.
    """
    found = dict(arrays)
    if part != Part.whole(problem):
        found |= _cut(arrays, part, problem)
    if "dropout_key" in arrays:
        first_head = part.kv_heads[0] * problem.group
        places = (part.batch[0], problem.heads, first_head, part.queries[0], part.keys[0], 0)
        found["dropout_words"] = mx.concatenate([arrays["dropout_key"], mx.array(places, dtype=mx.uint32)])
    return found


def _cut(arrays: Arrays, part: Part, problem: AttentionProblem) -> Arrays:
    """The arrays with the part's rows of the batch, heads, queries and keys: views, but for small integer arrays.

    Queries and keys count from the first of the part, so whatever says where a key is, or how far, is shifted.
    """
    batch, queries, keys = slice(*part.batch), slice(*part.queries), slice(*part.keys)
    heads = slice(*(end * problem.group for end in part.kv_heads))
    along = {"row_bounds": queries, "query_segments": queries, "key_segments": keys}
    found = {}
    for name, array in arrays.items():
        if name in _BATCH_HEADS_QUERIES:
            found[name] = array[batch, heads, queries]
        elif name in ("key", "value"):
            found[name] = array[batch, slice(*part.kv_heads), keys]
        elif name in _HEADS_FIRST:
            found[name] = array[heads]
        elif name in _BATCH_FIRST:
            array = array[batch] if array.shape[0] > 1 else array
            found[name] = array[:, along[name]] if name in along else array
    if "bias" in found:
        found["bias"] = found["bias"][..., keys]
    if "relative_bias" in found:  # diagonal number j - i + Lq - 1
        first = keys.start - (queries.stop - 1) + problem.query_length - 1
        found["relative_bias"] = found["relative_bias"][:, first : keys.stop - queries.start + problem.query_length - 1]
    if "query_offset" in found:
        found["query_offset"] = found["query_offset"] + (queries.start - keys.start)
    length = keys.stop - keys.start
    if "row_bounds" in found and length != problem.key_length:
        bounds = mx.clip(found["row_bounds"] - keys.start, 0, length)
        found["row_bounds"] = _row_bounds(bounds[..., 0], bounds[..., 1], length)
    if "prefix" in found:
        found["prefix"] = mx.clip(found["prefix"] - keys.start, 0, length)
    return found


def segment_ranges(query_segments: mx.array, key_segments: mx.array) -> tuple[mx.array, mx.array]:
    """Index of the first and the last key of each query's segment: int32 (1 | B, Lq) each.

    query_segments (1 | B, Lq), key_segments (1 | B, Lk): any ids in any order. Where a segment has no key the range is
    empty: first is Lk and last -1.
    """
    batch = max(query_segments.shape[0], key_segments.shape[0])
    query_length, key_length = query_segments.shape[1], key_segments.shape[1]
    ids = mx.concatenate(
        [mx.broadcast_to(key_segments, (batch, key_length)), mx.broadcast_to(query_segments, (batch, query_length))],
        axis=1,
    )
    # Ids may be anything: number them 0, 1, 2 ... in the order of their size.
    order = mx.argsort(ids, axis=1)
    ordered = mx.take_along_axis(ids, order, axis=1)
    changes = mx.concatenate([mx.zeros((batch, 1), dtype=mx.bool_), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    rank = mx.put_along_axis(mx.zeros_like(ids), order, mx.cumsum(changes.astype(mx.int32), axis=1), axis=1)
    rank = rank + mx.arange(batch, dtype=mx.int32)[:, None] * (query_length + key_length)
    key_rank, query_rank = rank[:, :key_length], rank[:, key_length:]
    position = mx.broadcast_to(mx.arange(key_length, dtype=mx.int32), (batch, key_length))
    count = batch * (query_length + key_length)
    first = mx.full((count,), key_length, dtype=mx.int32).at[key_rank].minimum(position)
    last = mx.full((count,), -1, dtype=mx.int32).at[key_rank].maximum(position)
    return first[query_rank], last[query_rank]


def block_bounds(row_bounds: mx.array, rows: int) -> mx.array:
    """Smallest and largest low, smallest and largest high of each block of rows: int32 (1 | B, blocks, 4).

    row_bounds (1 | B, Lq, 2).
    """
    batch, length, _ = row_bounds.shape
    blocks = -(-length // rows)
    padding = blocks * rows - length
    if padding:  # repeat the last row: it changes no minimum and no maximum
        row_bounds = mx.concatenate([row_bounds, mx.repeat(row_bounds[:, -1:], padding, axis=1)], axis=1)
    blocked = row_bounds.reshape(batch, blocks, rows, 2)
    return mx.stack([blocked.min(axis=2), blocked.max(axis=2)], axis=-1).reshape(batch, blocks, 4)


def readable(array: mx.array) -> mx.array:
    """The array flat, contiguous and in device memory for a kernel that indexes it itself."""
    flat = mx.contiguous(array).reshape(-1)
    if flat.size < _LEAST_ELEMENTS:
        flat = mx.concatenate([flat, mx.zeros((_LEAST_ELEMENTS - flat.size,), dtype=flat.dtype)])
    return flat


def readable_bias(bias: mx.array) -> mx.array:
    """A bias (B, H, Lq, Lk), usually a broadcast view with strides of 0, in device memory."""
    return bias if bias.size >= _LEAST_ELEMENTS else mx.pad(bias, [(0, 0), (0, 0), (0, 0), (0, _LEAST_ELEMENTS)])
