"""The shape of a Metal kernel, and what it takes of the hardware: threadgroup memory exactly, registers roughly.

Pure Python. A kernel works on a block of rows of one side (queries in the forward and dQ kernels, keys in dK/dV), 8
rows a simdgroup, and streams the other side in tiles through threadgroup memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlxlm.kernels.attention.problem import AttentionProblem

THREADGROUP_BYTES = 32 * 1024  # of every Apple GPU (Metal feature set tables)
REGISTERS = 128  # 32-bit registers a thread can address on Apple GPUs; beyond that the compiler spills
REGISTER_OVERHEAD = 20  # addresses, loop counters, row maxima and sums, fragments in flight: an estimate
SIMD_WIDTH = 32
FRAGMENT = 8  # simdgroup_matrix is 8 x 8: each lane holds two of its 64 elements


@dataclass(frozen=True, kw_only=True)
class KernelTile:
    """The shape of one kernel.

    kernel: "forward", "dq", "dkdv" or "decode"; the kernels of bias gradients have the shape of "dq".
    block_queries, block_keys: rows of a block on each side. The resident side (queries in forward and dq, keys in
        dkdv) has FRAGMENT rows a simdgroup. In the decode kernel block_queries counts the query rows of all heads
        that are served together, block_keys the keys a simdgroup takes at a time.
    head_dim, value_dim: padded to a multiple of FRAGMENT.
    resident: where the block's own operands stay, "threadgroup" memory or "registers".
    streamed_tiles: threadgroup buffers for the streamed side: 2 (each operand its own) or 1 (taking turns).
    passes: 1, or 2 when dK and dV are accumulated in separate runs over the queries.
    splits: parts of the key range in the decode kernel, combined afterwards; 1 elsewhere.
    """

    kernel: str
    element_bytes: int
    block_queries: int
    block_keys: int
    simdgroups: int
    head_dim: int
    value_dim: int
    resident: Literal["threadgroup", "registers"]
    streamed_tiles: int = 2
    passes: int = 1
    splits: int = 1

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return self.simdgroups * SIMD_WIDTH

    def tile_bytes(self, rows: int, width: int) -> int:
        """Bytes of a row-major threadgroup tile, each row padded by 16 bytes against bank conflicts."""
        return rows * (width * self.element_bytes + 16)

    @property
    def registers_per_lane(self) -> int:
        """Estimated 32-bit registers a lane: accumulators and scores in float32, operands in their own type."""
        d, e = self.head_dim / 4, self.value_dim / 4  # an 8 x width strip over 32 lanes
        scores = (self.block_queries if self.kernel == "dkdv" else self.block_keys) / 4
        if self.kernel == "decode":
            held = e + scores + 8  # the chunks of two keys, 16 bytes each
        elif self.kernel == "forward":
            held = e + scores
        elif self.kernel == "dq":
            held = d + 2 * scores
        else:
            held = (d + e if self.passes == 1 else max(d, e)) + 2 * scores
        if self.resident == "registers":
            held += self.element_bytes / 4 * (d + e)
        return round(held) + REGISTER_OVERHEAD


def threadgroup_arrays(
    kernel: str, tile: KernelTile, problem: AttentionProblem, *, compute_dk: bool = True
) -> dict[str, int]:
    """Bytes of each array that a kernel's text declares in threadgroup memory, by the name it has there.

    kernel: the name of the text, without its ending.  compute_dk: whether the run of key_value_gradient is one for dK;
    with two passes the other one needs no tile of values.
    """
    d, e, q, k = tile.head_dim, tile.value_dim, tile.block_queries, tile.block_keys
    of_keys = {}
    if problem.relative_bias:
        of_keys["relative_tile"] = 4 * (q + k)
    if problem.segments:
        of_keys["segment_tile"] = 4 * k
    if kernel == "forward":
        return {"query_tile": tile.tile_bytes(q, d), "key_value_tile": tile.tile_bytes(k, max(d, e))} | of_keys
    if kernel == "decode":
        partial = {"output_tile": 4 * tile.simdgroups * q * e, "statistics_tile": 8 * tile.simdgroups * q}
        return {"query_tile": tile.tile_bytes(q, d)} | partial
    if kernel == "key_value_gradient":
        return _key_value_gradient_arrays(tile, problem, compute_dk)
    if kernel not in ("query_gradient", "bias_gradient", "relative_bias_gradient"):
        return {}
    arrays = _streamed("key_tile", "value_tile", k, tile) | of_keys
    if tile.resident == "threadgroup":
        arrays |= {"query_tile": tile.tile_bytes(q, d), "gradient_tile": tile.tile_bytes(q, e)}
    if kernel == "query_gradient" and problem.alibi:
        arrays["slope_sums"] = 4 * tile.simdgroups
    if kernel == "bias_gradient" and problem.bias_broadcast[2]:
        arrays["column_sums"] = 4 * tile.simdgroups * k
    if kernel == "relative_bias_gradient":
        arrays["score_tile"] = 4 * q * (k + 1)
    return arrays


def _key_value_gradient_arrays(tile: KernelTile, problem: AttentionProblem, compute_dk: bool) -> dict[str, int]:
    q, k = tile.block_queries, tile.block_keys
    arrays = _streamed("query_tile", "gradient_tile", q, tile) | {"statistics_tile": 8 * q}
    if problem.masked:
        arrays["bounds_tile"] = 8 * q
    if problem.segments:
        arrays["segment_tile"] = 4 * q
    if problem.dropout:
        arrays["dropout_tile"] = 4 * q
    if problem.relative_bias:
        arrays["relative_tile"] = 4 * (q + k)
    if tile.resident == "threadgroup":
        arrays["key_tile"] = tile.tile_bytes(k, tile.head_dim)
        if compute_dk:
            arrays["value_tile"] = tile.tile_bytes(k, tile.value_dim)
    return arrays


def _streamed(first: str, second: str, rows: int, tile: KernelTile) -> dict[str, int]:
    """The buffers of the streamed side: two, or one that its operands take turns in."""
    if tile.streamed_tiles == 1:
        return {first: tile.tile_bytes(rows, max(tile.head_dim, tile.value_dim))}
    return {first: tile.tile_bytes(rows, tile.head_dim), second: tile.tile_bytes(rows, tile.value_dim)}
