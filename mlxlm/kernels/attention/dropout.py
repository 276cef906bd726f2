"""Dropout of attention weights by a counter-based hash: the same bits in every implementation, none stored.

The element (b, h, q, k), where h is the query head and q, k are local indices (no offset), keeps its weight iff

    word(b, h, q, k) = mix(row ^ (k * 0x9E3779B9)) >= threshold
    row(b, h, q)     = mix(mix(mix(b * H + h + key[0]) ^ key[1]) + q)
    threshold        = min(floor(rate * 2**32), 2**32 - 1)

in unsigned 32-bit arithmetic that wraps, where `key` is the pair of uint32 words of an mx.random key and

    mix(x): x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16

is the `lowbias32` integer hash (Wellons 2018, "Prospecting for Hash Functions"). Kept weights are divided by
1 - rate. The row word costs three mixes a row, an element one.
"""

from __future__ import annotations

import mlx.core as mx

GOLDEN = 0x9E3779B9  # 2**32 / golden ratio, odd: spreads neighbouring k over all bits before the hash


def threshold(rate: float) -> int:
    """The smallest 32-bit word that is kept at this dropout rate."""
    return min(int(rate * 2**32), 2**32 - 1)


def keep_mask(
    key: mx.array,
    rate: float,
    batch: int,
    heads: int,
    rows: tuple[int, int],
    keys: tuple[int, int],
    part: tuple[slice, slice] = (slice(None), slice(None)),
) -> mx.array:
    """Which weights survive: bool (B, H, rows, keys) for queries [start, stop) and keys [start, stop).

    key: (2,) uint32, see mx.random.key.  rate: share of weights to drop, 0 <= rate < 1.  part: the batch rows and
    query heads that are wanted, of `batch` and `heads`; default all.
    """
    head = mx.arange(batch * heads, dtype=mx.uint32).reshape(batch, heads, 1, 1)[part]
    query = mx.arange(*rows, dtype=mx.uint32)[:, None]
    counter = mx.arange(*keys, dtype=mx.uint32) * mx.array(GOLDEN, dtype=mx.uint32)
    row = _mix(_mix(_mix(head + key[0]) ^ key[1]) + query)
    return _mix(row ^ counter) >= mx.array(threshold(rate), dtype=mx.uint32)


def _mix(x: mx.array) -> mx.array:
    x = x ^ (x >> 16)
    x = x * mx.array(0x7FEB352D, dtype=mx.uint32)
    x = x ^ (x >> 15)
    x = x * mx.array(0x846CA68B, dtype=mx.uint32)
    return x ^ (x >> 16)
