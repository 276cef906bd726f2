"""How long a launch of a Metal kernel may run, and how a call is cut into launches that stay below that. Pure Python.

macOS kills command buffers that run for seconds on a Mac with a display (mlx#3267), so no launch is planned to take
more than DISPATCH_SECONDS at a quarter of the device's peak. A launch serves a `Part`: some rows of the batch, key
heads, queries and keys. Work is counted from above: what segments and array-valued masks hide counts as seen.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

from mlxlm.kernels.attention.device import DeviceProfile
from mlxlm.kernels.attention.problem import AttentionProblem
from mlxlm.kernels.attention.tile import KernelTile

DISPATCH_SECONDS = 0.25
UTILISATION = 0.25  # assumed share of peak in the worst case, so that DISPATCH_SECONDS is an upper bound
CORE_THREADGROUPS = 2  # threadgroups that a core needs to be busy: an estimate
DELTA_ROWS = 8  # rows of a threadgroup of the delta kernel, one simdgroup each

Range = tuple[int, int]

# The axes that a kernel's launches may be cut along, first the ones that cost least: what parts of an axis give is
# joined where the result has that axis, else added up.
AXES = {
    "forward": ("batch", "kv_heads", "queries"),
    "delta": ("batch", "kv_heads", "queries"),
    "query_gradient": ("batch", "kv_heads", "queries", "keys"),
    "key_value_gradient": ("batch", "kv_heads", "keys", "queries"),
    "bias_gradient": ("batch", "kv_heads", "queries", "keys"),
    "relative_bias_gradient": ("kv_heads", "batch", "queries"),
    "decode": ("batch", "kv_heads", "keys"),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one launch works on: [start, stop) of each axis."""

    batch: Range
    kv_heads: Range
    queries: Range
    keys: Range

    @staticmethod
    def whole(problem: AttentionProblem) -> Part:
        """All of a call."""
        batch, kv_heads, queries, keys = ((0, length) for length in _lengths(problem))
        return Part(batch=batch, kv_heads=kv_heads, queries=queries, keys=keys)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Into how many parts of nearly the same size the launches of a kernel cut each axis."""

    batch: int = 1
    kv_heads: int = 1
    queries: int = 1
    keys: int = 1

    def parts(self, problem: AttentionProblem, tile: KernelTile | None) -> list[Part]:
        """The parts, the keys of the same queries first; queries and keys are cut between blocks of the tile."""
        sizes = _units(problem, tile)
        ranges = [
            _ranges(count, getattr(self, axis), step, length)
            for (axis, (count, step)), length in zip(sizes.items(), _lengths(problem), strict=True)
        ]
        return [
            Part(batch=batch, kv_heads=kv_heads, queries=queries, keys=keys)
            for batch, kv_heads, queries, keys in itertools.product(*ranges)
        ]


@lru_cache(maxsize=1024)
def split_of(kernel: str, problem: AttentionProblem, tile: KernelTile | None, device: DeviceProfile) -> Split:
    """Launches of a kernel, few of them, that stay below DISPATCH_SECONDS each as far as its axes can be cut."""

    def longest(split: Split) -> float:
        return max(seconds(kernel, problem, tile, device, part) for part in split.parts(problem, tile))

    split, units = Split(), _units(problem, tile)
    now = longest(split)
    for axis in AXES[kernel]:
        count = units[axis][0]
        while now > DISPATCH_SECONDS and (parts := getattr(split, axis)) < count:
            largest = -(-count // parts)
            smaller = max(1, min(largest - 1, int(largest * DISPATCH_SECONDS / now)))
            finer = replace(split, **{axis: -(-count // smaller)})
            before, now = now, longest(finer)
            if now > before * (1 - 1e-6):  # too few threadgroups are left for all cores: finer parts take as long
                now = before
                break
            split = finer
    return split


def seconds(
    kernel: str, problem: AttentionProblem, tile: KernelTile | None, device: DeviceProfile, part: Part
) -> float:
    """Time of a launch at UTILISATION of the device's peak, an upper bound; tile: the kernel's, None for delta."""
    batch, kv_heads, queries, keys = (stop - start for start, stop in vars(part).values())
    heads, d, e = kv_heads * problem.group, problem.head_dim, problem.value_dim
    pairs = batch * heads * visible_pairs(problem, part.queries, part.keys)
    together = tile.block_queries // problem.query_length if kernel == "decode" and tile else problem.group
    keys_read = 0 if kernel == "delta" else kv_heads * problem.group // together * keys
    elements = batch * (heads * queries + keys_read) * (d + e)
    widths = {
        "forward": d + e, "query_gradient": 2 * d + e, "key_value_gradient": 2 * (d + e), "bias_gradient": d + e,
        "relative_bias_gradient": d + e, "decode": d + e, "delta": 0,
    }[kernel]  # fmt: skip
    if tile is not None and kernel == "relative_bias_gradient":
        # A band of `threads` diagonals crosses more keys than that in a block of queries, and in whole tiles.
        widths *= (tile.block_queries + tile.threads - 1 + tile.block_keys) / tile.threads
    share = min(1.0, _threadgroups(kernel, problem, tile, part) / (CORE_THREADGROUPS * device.cores))
    computing = 2.0 * pairs * widths / (device.teraflops * 1e12)
    reading = elements * problem.element_bytes / (device.bandwidth * 1e9)
    return max(computing, reading) / (UTILISATION * share)


def visible_pairs(problem: AttentionProblem, queries: Range, keys: Range) -> int:
    """How many of these queries and keys see each other at most, for one head: exact for causality and a window."""
    rows, columns = queries[1] - queries[0], keys[1] - keys[0]
    if problem.prefix or problem.query_offset is None or not (problem.causal or problem.window is not None):
        return rows * columns
    first = queries[0] + problem.query_offset - keys[0]  # the first query's position among these keys
    if problem.window is None:
        return _area(first + 1, rows, columns)
    ahead = 0 if problem.causal else problem.window - 1
    # Without the keys that have left the window: as many as a causal mask would show that lags behind by it.
    return _area(first + ahead + 1, rows, columns) - _area(first - problem.window + 1, rows, columns)


def _area(first: int, rows: int, columns: int) -> int:
    """The sum of min(max(first + i, 0), columns) over i = 0 .. rows - 1."""

    def up_to(n: int) -> int:  # the sum of min(max(x, 0), columns) over x < n, from 0
        n = max(n, 0)
        inner = min(n, columns + 1)
        return inner * (inner - 1) // 2 + (n - inner) * columns

    return up_to(first + rows) - up_to(first)


def _threadgroups(kernel: str, problem: AttentionProblem, tile: KernelTile | None, part: Part) -> int:
    batch, kv_heads, queries, keys = (stop - start for start, stop in vars(part).values())
    heads = kv_heads * problem.group
    if tile is None:
        return batch * heads * -(-queries // DELTA_ROWS)
    query_blocks, key_blocks = -(-queries // tile.block_queries), -(-keys // tile.block_keys)
    if kernel == "key_value_gradient":
        return batch * kv_heads * key_blocks
    if kernel == "bias_gradient":
        owned = zip((batch, heads, query_blocks, key_blocks), problem.bias_broadcast, strict=True)
        count = 1
        for size, broadcast in owned:
            count *= 1 if broadcast else size
        return count
    if kernel == "relative_bias_gradient":
        return heads * -(-(queries + keys - 1) // tile.threads)
    if kernel == "decode":
        return batch * heads * queries // tile.block_queries * tile.splits
    return batch * heads * query_blocks


def _lengths(problem: AttentionProblem) -> tuple[int, int, int, int]:
    return problem.batch, problem.kv_heads, problem.query_length, problem.key_length


def _units(problem: AttentionProblem, tile: KernelTile | None) -> dict[str, tuple[int, int]]:
    """By axis: how many parts it can be cut into, and the size of the smallest one."""
    queries, keys = (tile.block_queries, tile.block_keys) if tile else (DELTA_ROWS, 1)
    steps = {"batch": 1, "kv_heads": 1, "queries": queries, "keys": keys}
    return {
        axis: (-(-length // step), step) for (axis, step), length in zip(steps.items(), _lengths(problem), strict=True)
    }


def _ranges(units: int, parts: int, step: int, length: int) -> list[Range]:
    """`length`, which is `units` steps long, in at most `parts` ranges of nearly the same number of steps."""
    parts = max(1, min(units, parts))
    edges = [min(units * i // parts * step, length) for i in range(parts + 1)]
    return list(itertools.pairwise(edges))
