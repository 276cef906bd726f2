"""Tile shapes as data: what each kernel keeps where on each kind of device. Pure Python; no array is touched.

The table below chooses the shapes by element size and head width; tile.py turns a choice into threadgroup bytes and
registers, launches.py into launches that are short enough, and tests hold every choice to the hardware's limits.
Register counts and speeds are estimates: only a Mac can confirm them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from mlxlm.errors import AttentionError
from mlxlm.kernels.attention.device import DeviceProfile
from mlxlm.kernels.attention.launches import AXES, Part, Split, split_of
from mlxlm.kernels.attention.problem import AttentionProblem
from mlxlm.kernels.attention.tile import FRAGMENT, SIMD_WIDTH, THREADGROUP_BYTES, KernelTile, threadgroup_arrays


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """All kernel shapes of one problem on one device, and the launches of each kernel.

    decode is None for more than MAX_DECODE_ROWS rows; else it takes the place of forward.
    splits: launches by the name of a kernel's text, where they are not to be those that `split_of` finds.
    """

    problem: AttentionProblem
    device: DeviceProfile
    forward: KernelTile
    dq: KernelTile
    dkdv: KernelTile
    decode: KernelTile | None
    splits: Mapping[str, Split] = field(default_factory=dict)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that the call may run, by the names of their texts."""
        other = "forward" if self.decode else "decode"
        return tuple(kernel for kernel in AXES if kernel != other)

    def tile(self, kernel: str) -> KernelTile | None:
        """The shape of a kernel by the name of its text; None for those that have no tiles."""
        shapes = {"forward": self.forward, "key_value_gradient": self.dkdv, "decode": self.decode}
        shapes |= dict.fromkeys(("query_gradient", "bias_gradient", "relative_bias_gradient"), self.dq)
        return shapes.get(kernel)

    def split(self, kernel: str) -> Split:
        """The launches of a kernel."""
        return self.splits.get(kernel) or split_of(kernel, self.problem, self.tile(kernel), self.device)

    def parts(self, kernel: str) -> list[Part]:
        """What each launch of a kernel works on."""
        return self.split(kernel).parts(self.problem, self.tile(kernel))

    def threadgroup_bytes(self, kernel: str) -> int:
        """Threadgroup memory that a kernel declares, of two passes that of the larger one."""
        tile = self.tile(kernel)
        return 0 if tile is None else sum(threadgroup_arrays(kernel, tile, self.problem).values())


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


@lru_cache(maxsize=256)  # all layers of a model ask for the same
def plan(problem: AttentionProblem, device: DeviceProfile) -> TilePlan:
    """The kernel shapes for a problem on a device, and their launches.

    Raises AttentionError for a head wider than MAX_HEAD_DIM.
    """
    decode = _decode_tile(problem, device) if problem.query_length <= MAX_DECODE_ROWS else None
    forward, dq, dkdv = (_tile(kernel, problem, device) for kernel in ("forward", "dq", "dkdv"))
    if decode and decode.splits == 1 and split_of("decode", problem, decode, device).keys > 1:
        decode = replace(decode, splits=2)  # an unsplit range of keys gives final results, a part of one must not
    return TilePlan(problem=problem, device=device, forward=forward, dq=dq, dkdv=dkdv, decode=decode)


def _tile(kernel: str, problem: AttentionProblem, device: DeviceProfile) -> KernelTile:
    head_dim, value_dim = (_round_up(width, FRAGMENT) for width in (problem.head_dim, problem.value_dim))
    row = _table_row(kernel, problem.element_bytes, max(head_dim, value_dim), device.generation)
    rows, streamed, resident, streamed_tiles, passes = row
    queries, keys = (streamed, rows) if kernel == "dkdv" else (rows, streamed)
    return KernelTile(
        kernel=kernel, element_bytes=problem.element_bytes, block_queries=queries, block_keys=keys,
        simdgroups=rows // FRAGMENT, head_dim=head_dim, value_dim=value_dim, resident=resident,
        streamed_tiles=streamed_tiles, passes=passes,
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
    while sum(threadgroup_arrays("decode", tile, problem).values()) > THREADGROUP_BYTES:
        tile = replace(tile, simdgroups=tile.simdgroups // 2)
    return tile


def _decodes(problem: AttentionProblem, heads: int) -> bool:
    return heads == 1 or heads * problem.query_length <= MAX_DECODE_ROWS


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
