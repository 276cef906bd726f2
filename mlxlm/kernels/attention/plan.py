"""Tile shapes as data: what each kernel keeps where on each kind of device. Pure Python; no array is touched.

A Metal kernel works on a block of rows of one side (queries in the forward and dQ kernels, keys in dK/dV), 8 rows a
simdgroup, and streams the other side in tiles through threadgroup memory. The table below chooses the shapes by element
size and head width; the formulas turn a choice into threadgroup bytes and registers, and a test holds every choice to
the hardware's limits. Register counts and speeds are estimates: only a Mac can confirm them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from mlxlm.errors import AttentionError

THREADGROUP_BYTES = 32 * 1024  # of every Apple GPU (Metal feature set tables)
REGISTERS = 128  # 32-bit registers a thread can address on Apple GPUs; beyond that the compiler spills
REGISTER_OVERHEAD = 20  # addresses, loop counters, row maxima and sums, fragments in flight: an estimate
SIMD_WIDTH = 32
FRAGMENT = 8  # simdgroup_matrix is 8 x 8: each lane holds two of its 64 elements
DISPATCH_SECONDS = 0.25  # a command buffer that runs for seconds trips the watchdog of a Mac with a display (mlx#3267)
UTILISATION = 0.25  # assumed share of peak in the worst case, so that DISPATCH_SECONDS is an upper bound

_MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What the planner knows about a device.

    kind: "metal", "cuda" or "cpu".  generation: 1 (M1) to 5 (M5), 0 when not an Apple GPU.  cores: GPU cores.
    teraflops, bandwidth: float32 TFLOP/s and GB/s.  working_set: bytes the device recommends to use, None if unknown.
    block_bytes: what the scores of one block of the tiled path may take, up to BUDGET_KEYS keys.
    block_rows: queries of a block of the tiled path below which heads are split rather than rows.
    short_bytes: up to this size of all scores in float32, a dense computation is as good as tiles.
    """

    name: str
    kind: Literal["metal", "cuda", "cpu"]
    generation: int = 0
    cores: int = 1
    teraflops: float = 1.0
    bandwidth: float = 50.0
    working_set: int | None = None
    block_bytes: int = 32 * _MIB
    block_rows: int = 128
    short_bytes: int = 64 * _MIB

    @property
    def native_bfloat16(self) -> bool:
        """Whether the GPU computes bfloat16 without emulation: M3 and later."""
        return self.kind != "metal" or self.generation >= 3


# Apple's architecture names: "applegpu_g13s" is generation 13 (M1), variant s (Max). The variant g is both the plain
# chip and the Pro; its figures are the plain chip's. (cores, TFLOP/s, GB/s) after Apple's data sheets, M5 by bandwidth.
_VARIANTS = {"p": "", "g": "", "c": " Max", "s": " Max", "d": " Ultra"}
_CHIPS: dict[tuple[int, str], tuple[int, float, float]] = {
    (1, ""): (8, 2.6, 68), (1, " Max"): (32, 10.6, 400), (1, " Ultra"): (64, 21.2, 800),
    (2, ""): (10, 3.6, 100), (2, " Max"): (38, 13.6, 400), (2, " Ultra"): (76, 27.2, 800),
    (3, ""): (10, 3.6, 100), (3, " Max"): (40, 14.2, 400), (3, " Ultra"): (80, 28.4, 819),
    (4, ""): (10, 3.6, 120), (4, " Max"): (40, 18.4, 546), (4, " Ultra"): (80, 36.8, 1092),
    (5, ""): (10, 4.2, 153), (5, " Max"): (40, 18.4, 614), (5, " Ultra"): (80, 36.8, 1228),
}  # fmt: skip


def metal_profile(architecture: str, working_set: int | None = None) -> DeviceProfile:
    """The profile of an Apple GPU by its `architecture`, such as "applegpu_g14g".

    A generation newer than the table counts as its newest, an unreadable name as the oldest: both only affect speed.
    """
    digits = "".join(c for c in architecture.rpartition("_g")[2] if c.isdigit())
    generation = min(max(int(digits) - 12, 1), 5) if digits else 1
    variant = _VARIANTS.get(architecture[-1:], "")
    cores, teraflops, bandwidth = _CHIPS[generation, variant]
    block = 64 * _MIB if working_set is None else min(max(working_set // 64, 64 * _MIB), 256 * _MIB)
    return DeviceProfile(
        name=f"M{generation}{variant}", kind="metal", generation=generation, cores=cores, teraflops=teraflops,
        bandwidth=bandwidth, working_set=working_set, block_bytes=block, block_rows=512,
    )  # fmt: skip


# MLX's attention on the CPU is slower than tiles from about L=256 (4 heads), measured on x86 with OpenBLAS.
CPU = DeviceProfile(name="cpu", kind="cpu", block_bytes=32 * _MIB, short_bytes=_MIB)
# Measured on an H200, see README.md: dense attention is better in time and memory up to 512 MiB of scores.
CUDA = DeviceProfile(
    name="cuda",
    kind="cuda",
    cores=132,
    teraflops=60.0,
    bandwidth=3000.0,
    block_bytes=160 * _MIB,
    block_rows=512,
    short_bytes=512 * _MIB,
)


def device_profile(backend: str) -> DeviceProfile:
    """The profile of MLX's device for a backend name of `mlxlm.runtime.backend()`."""
    return {"cpu": CPU, "cuda": CUDA}.get(backend) or _this_metal_device()


@lru_cache(maxsize=1)
def _this_metal_device() -> DeviceProfile:
    import mlx.core as mx

    info = mx.device_info()
    return metal_profile(str(info.get("architecture", "")), info.get("max_recommended_working_set_size"))


_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """The static description of one call: all that may steer the choice of a kernel, nothing that needs evaluation.

    dtype: "float32", "float16" or "bfloat16".  kv_heads divides heads.  query_offset: None where it is an array.
    segments, prefix, lengths: whether the mask has them.  alibi, relative_bias, bias, sinks: whether they are given.
    """

    dtype: str
    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    causal: bool = False
    window: int | None = None
    query_offset: int | None = 0
    prefix: bool = False
    lengths: bool = False
    segments: bool = False
    alibi: bool = False
    relative_bias: bool = False
    bias: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    return_lse: bool = False

    @property
    def element_bytes(self) -> int:
        return _ELEMENT_BYTES[self.dtype]

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.heads // self.kv_heads

    @property
    def score_bytes(self) -> int:
        """Bytes of all scores in float32, which a dense implementation holds at least once."""
        return 4 * self.batch * self.heads * self.query_length * self.key_length

    @property
    def mean_keys(self) -> float:
        """Mean number of keys that causality and window leave to a query."""
        keys = self.key_length
        if self.prefix or self.query_offset is None:
            return keys
        mean = keys
        if self.causal:
            mean = max(1.0, min(keys, max(self.query_offset, 0) + (self.query_length + 1) / 2))
        if self.window is not None:
            mean = min(mean, self.window if self.causal else 2 * self.window - 1)
        return mean

    def widest_range(self, rows: int) -> int:
        """Most keys that a block of `rows` queries can see."""
        if self.window is None or self.prefix or self.query_offset is None:
            return self.key_length
        return min(self.key_length, (self.window - 1) * (1 if self.causal else 2) + rows)

    @property
    def flops(self) -> float:
        """Floating point operations of the forward pass, causality and window counted."""
        products = self.batch * self.heads * self.query_length * self.mean_keys
        return 2.0 * products * (self.head_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class KernelTile:
    """The shape of one Metal kernel.

    kernel: "forward", "dq", "dkdv" or "decode".
    block_queries, block_keys: rows of a block on each side. The resident side (queries in forward and dq, keys in
        dkdv) has FRAGMENT rows a simdgroup. In the decode kernel block_queries counts the query rows of all heads
        that are served together, block_keys the keys a simdgroup takes at a time.
    head_dim, value_dim: padded to a multiple of FRAGMENT.
    resident: where the block's own operands stay, "threadgroup" memory or "registers".
    streamed_tiles: threadgroup buffers for the streamed side: 2 (each operand its own) or 1 (taking turns).
    passes: 1, or 2 when dK and dV are accumulated in separate runs over the queries.
    dispatches: launches over which batch * kv_heads is split, so that each stays short.
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
    dispatches: int = 1
    splits: int = 1

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return self.simdgroups * SIMD_WIDTH

    @property
    def padding(self) -> int:
        """Elements added to each row in threadgroup memory against bank conflicts: 16 bytes."""
        return 16 // self.element_bytes

    def tile_bytes(self, rows: int, width: int) -> int:
        """Bytes of a row-major threadgroup tile."""
        return rows * (width + self.padding) * self.element_bytes

    @property
    def threadgroup_bytes(self) -> int:
        """Threadgroup memory that the kernel declares."""
        d, e, q, k = self.head_dim, self.value_dim, self.block_queries, self.block_keys
        if self.kernel == "forward":
            # One buffer takes turns: K transposed (d rows of k), then V.
            return self.tile_bytes(q, d) + max(self.tile_bytes(d, k), self.tile_bytes(k, e))
        if self.kernel == "decode":
            # The queries, and what each simdgroup leaves of each row: partial output, maximum and sum in float32.
            return q * d * self.element_bytes + 4 * self.simdgroups * q * (e + 2)
        mine, streamed = (q, k) if self.kernel == "dq" else (k, q)
        resident = self.tile_bytes(mine, d) + self.tile_bytes(mine, e) if self.resident == "threadgroup" else 0
        tiles = (self.tile_bytes(streamed, d), self.tile_bytes(streamed, e))
        statistics = 8 * q if self.kernel == "dkdv" else 0  # LSE and delta of the streamed queries
        return resident + (sum(tiles) if self.streamed_tiles == 2 else max(tiles)) + statistics

    @property
    def registers_per_lane(self) -> int:
        """Estimated 32-bit registers a lane: accumulators and scores in float32, operands in their own type."""
        d, e = self.head_dim / 4, self.value_dim / 4  # an 8 x width strip over 32 lanes
        operand = self.element_bytes / 4
        if self.kernel == "decode":
            return round(self.block_queries * (self.value_dim / SIMD_WIDTH + 2)) + REGISTER_OVERHEAD
        streamed = self.block_queries if self.kernel == "dkdv" else self.block_keys
        scores = streamed / 4
        if self.kernel == "forward":
            held = e + scores
        elif self.kernel == "dq":
            held = d + 2 * scores
        else:
            held = (d + e if self.passes == 1 else max(d, e)) + 2 * scores
        if self.resident == "registers":
            held += operand * (d + e)
        return round(held) + REGISTER_OVERHEAD


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """All kernel shapes of one problem on one device. decode is None for more than MAX_DECODE_ROWS rows."""

    problem: AttentionProblem
    device: DeviceProfile
    forward: KernelTile
    dq: KernelTile
    dkdv: KernelTile
    decode: KernelTile | None


# The table. Widest head dimension -> (rows, streamed, resident, streamed tiles, passes), by element bytes; `rows` are
# the block's own rows (8 a simdgroup), `streamed` the rows of a streamed tile. "late" is M3 and later, whose larger
# register cache takes wider tiles; where it names no entry the "early" one holds.
_Row = tuple[int, int, str, int, int]
_THREADGROUP, _REGISTERS = "threadgroup", "registers"
_TABLE: dict[tuple[str, int, str], dict[int, _Row]] = {
    ("forward", 2, "early"): {
        64: (32, 32, _THREADGROUP, 1, 1),
        96: (32, 32, _THREADGROUP, 1, 1),
        128: (32, 16, _THREADGROUP, 1, 1),
        192: (32, 16, _THREADGROUP, 1, 1),
        256: (32, 16, _THREADGROUP, 1, 1),
    },
    ("forward", 2, "late"): {128: (32, 32, _THREADGROUP, 1, 1)},
    ("forward", 4, "early"): {
        64: (32, 16, _THREADGROUP, 1, 1),
        96: (32, 16, _THREADGROUP, 1, 1),
        128: (32, 16, _THREADGROUP, 1, 1),
        160: (32, 8, _THREADGROUP, 1, 1),
        192: (16, 16, _THREADGROUP, 1, 1),
        256: (16, 8, _THREADGROUP, 1, 1),
    },
    ("forward", 4, "late"): {64: (32, 32, _THREADGROUP, 1, 1)},
    ("dq", 2, "early"): {
        64: (32, 32, _REGISTERS, 2, 1),
        96: (32, 32, _REGISTERS, 2, 1),
        128: (32, 16, _REGISTERS, 2, 1),
        192: (16, 16, _THREADGROUP, 2, 1),
        256: (16, 8, _THREADGROUP, 2, 1),
    },
    ("dq", 2, "late"): {128: (32, 32, _REGISTERS, 2, 1)},
    ("dq", 4, "early"): {
        64: (32, 16, _REGISTERS, 2, 1),
        96: (32, 16, _REGISTERS, 2, 1),
        128: (16, 8, _THREADGROUP, 2, 1),
        192: (16, 8, _THREADGROUP, 1, 1),
        256: (8, 8, _THREADGROUP, 1, 1),
    },
    ("dq", 4, "late"): {64: (32, 32, _REGISTERS, 2, 1)},
    ("dkdv", 2, "early"): {
        64: (32, 32, _REGISTERS, 2, 1),
        96: (32, 16, _REGISTERS, 2, 1),
        128: (32, 16, _THREADGROUP, 2, 1),
        192: (16, 16, _THREADGROUP, 2, 2),
        256: (16, 8, _THREADGROUP, 2, 2),
    },
    ("dkdv", 4, "early"): {
        64: (32, 16, _REGISTERS, 2, 1),
        96: (16, 16, _THREADGROUP, 2, 1),
        128: (16, 8, _THREADGROUP, 2, 1),
        192: (16, 8, _THREADGROUP, 1, 2),
        256: (8, 8, _THREADGROUP, 1, 2),
    },
}  # fmt: skip
MAX_HEAD_DIM = 256
MAX_DECODE_ROWS = 8
_DECODE_SIMDGROUPS = 8
_DECODE_SPLIT_KEYS = 256  # fewest keys that are worth a split of their own


def plan(problem: AttentionProblem, device: DeviceProfile) -> TilePlan:
    """The kernel shapes for a problem on a device.

    Raises AttentionError for a head wider than MAX_HEAD_DIM.
    """
    decode = _decode_tile(problem, device) if problem.query_length <= MAX_DECODE_ROWS else None
    forward, dq, dkdv = (_tile(kernel, problem, device) for kernel in ("forward", "dq", "dkdv"))
    return TilePlan(problem=problem, device=device, forward=forward, dq=dq, dkdv=dkdv, decode=decode)


def _tile(kernel: str, problem: AttentionProblem, device: DeviceProfile) -> KernelTile:
    head_dim, value_dim = (_round_up(width, FRAGMENT) for width in (problem.head_dim, problem.value_dim))
    row = _table_row(kernel, problem.element_bytes, max(head_dim, value_dim), device.generation)
    rows, streamed, resident, streamed_tiles, passes = row
    queries, keys = (streamed, rows) if kernel == "dkdv" else (rows, streamed)
    return KernelTile(
        kernel=kernel, element_bytes=problem.element_bytes, block_queries=queries, block_keys=keys,
        simdgroups=rows // FRAGMENT, head_dim=head_dim, value_dim=value_dim, resident=resident,
        streamed_tiles=streamed_tiles, passes=passes, dispatches=_dispatches(kernel, problem, device),
    )  # fmt: skip


def _table_row(kernel: str, element_bytes: int, width: int, generation: int) -> _Row:
    early = _TABLE[kernel, element_bytes, "early"]
    limit = next((limit for limit in early if width <= limit), None)
    if limit is None:
        raise AttentionError(f"heads of width {width} don't fit the Metal kernels; the widest is {MAX_HEAD_DIM}")
    late = _TABLE.get((kernel, element_bytes, "late"), {}) if generation >= 3 else {}
    return late.get(limit, early[limit])


def _decode_tile(problem: AttentionProblem, device: DeviceProfile) -> KernelTile:
    """Query rows that share a key head (all queries of as many heads as fit) against a part of the keys."""
    together = max(n for n in range(1, problem.group + 1) if problem.group % n == 0 and _decodes(problem, n))
    groups = problem.batch * problem.heads // together
    wanted = -(-4 * device.cores // groups)  # about four threadgroups a core hide the latency of memory
    splits = max(1, min(wanted, int(problem.mean_keys) // _DECODE_SPLIT_KEYS, 64))
    tile = KernelTile(
        kernel="decode", element_bytes=problem.element_bytes, block_queries=problem.query_length * together,
        block_keys=SIMD_WIDTH, simdgroups=_DECODE_SIMDGROUPS, head_dim=_round_up(problem.head_dim, FRAGMENT),
        value_dim=_round_up(problem.value_dim, FRAGMENT), resident="threadgroup", splits=splits,
    )  # fmt: skip
    while tile.threadgroup_bytes > THREADGROUP_BYTES:
        tile = replace(tile, simdgroups=tile.simdgroups // 2)
    return tile


def _decodes(problem: AttentionProblem, heads: int) -> bool:
    return heads == 1 or heads * problem.query_length <= MAX_DECODE_ROWS


MIN_BLOCK_ROWS = 32  # fewer rows a product waste the device; more would break a tight budget sooner
BUDGET_KEYS = 8192  # with more keys the budget grows as they do, so that the number of blocks is linear in the length
MAX_BLOCKS = 1024  # bounds the unrolled graph; beyond, blocks grow with the work
Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class HeadGroup:
    """What the tiled path takes on at once: rows of the batch and key heads (with their query heads), [start, stop).

    batch is a single row wherever heads are not all heads, so that a block is one strided batch of matrices.
    rows: the blocks of queries, computed one after the other.
    """

    batch: Range
    heads: Range
    rows: list[Range]


def head_groups(problem: AttentionProblem, device: DeviceProfile, scores_alive: int) -> list[HeadGroup]:
    """The groups of heads of the tiled path, each with its blocks of queries.

    Heads are split before rows: a group of heads has its own gradients of keys and values, so that the sums over row
    blocks are small and few, and taller blocks make better matrix products.

    scores_alive: how many arrays of the size of a block's scores exist at once.
    """
    B, K = problem.batch, problem.kv_heads
    rows = min(problem.query_length, device.block_rows)
    batch, heads = B, K
    budget = block_budget(problem, device)
    while (batch > 1 or heads > 1) and _block_bytes(problem, batch, heads, rows, scores_alive) > budget:
        batch, heads = ((batch + 1) // 2, heads) if batch > 1 else (1, (heads + 1) // 2)
    groups = [(b, h) for b in ranges(B, batch) for h in ranges(K, heads)]
    part = replace(problem, batch=batch, heads=heads * problem.group, kv_heads=heads)
    blocks = row_blocks(part, device, scores_alive, max(1, MAX_BLOCKS // len(groups)))
    return [HeadGroup(batch=b, heads=h, rows=blocks) for b, h in groups]


def row_blocks(
    problem: AttentionProblem, device: DeviceProfile, scores_alive: int, most_blocks: int = MAX_BLOCKS
) -> list[Range]:
    """Blocks of queries [start, stop) whose float32 scores, for all heads of the problem, fit the device's budget."""
    length, budget = problem.query_length, block_budget(problem, device)
    most = length
    if problem.query_offset is not None and not problem.prefix:
        if problem.causal:  # an eighth of the rows computes 9/16 of the square; smaller blocks gain little
            most = min(most, max(length // 8, device.block_rows))
        if problem.window is not None:  # half a window of rows computes 3/2 of what the window shows
            most = min(most, max(problem.window // 2, device.block_rows))

    def fits(rows: int) -> bool:
        return _block_bytes(problem, problem.batch, problem.kv_heads, rows, scores_alive) <= budget

    rows = MIN_BLOCK_ROWS
    while 2 * rows <= most and fits(2 * rows):
        rows *= 2
    if fits(most):
        rows = max(rows, most)
    return ranges(length, max(rows, -(-length // most_blocks)))


def block_budget(problem: AttentionProblem, device: DeviceProfile) -> int:
    """Bytes that the scores of one block may take."""
    keys = problem.widest_range(min(problem.query_length, device.block_rows))
    return device.block_bytes * max(keys, BUDGET_KEYS) // BUDGET_KEYS


def ranges(length: int, size: int) -> list[Range]:
    """[0, length) in ranges [start, stop) of `size`, the last one smaller if need be."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _block_bytes(problem: AttentionProblem, batch: int, kv_heads: int, rows: int, scores_alive: int) -> int:
    return 4 * scores_alive * batch * kv_heads * problem.group * rows * problem.widest_range(rows)


def _dispatches(kernel: str, problem: AttentionProblem, device: DeviceProfile) -> int:
    """Launches to split batch * kv_heads over, so that none runs longer than DISPATCH_SECONDS at poor utilisation."""
    products = {"forward": 2, "dq": 3, "dkdv": 4}[kernel]
    seconds = problem.flops * products / 2 / (device.teraflops * 1e12 * UTILISATION)
    return max(1, min(problem.batch * problem.kv_heads, -(-int(seconds * 1000) // int(DISPATCH_SECONDS * 1000))))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
