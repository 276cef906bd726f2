"""How the tiled path cuts a call into blocks of rows that fit a memory budget. Pure Python; no array is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlxlm.kernels.attention.device import DeviceProfile
from mlxlm.kernels.attention.launches import Range
from mlxlm.kernels.attention.problem import AttentionProblem

MIN_BLOCK_ROWS = 32  # fewer rows a product waste the device; more would break a tight budget sooner
BUDGET_KEYS = 8192  # with more keys the budget grows as they do, so that the number of blocks is linear in the length
IN_FLIGHT = 3  # budgets of scores that may exist at once: GPU backends schedule blocks ahead of the one that runs
WAITING_ALIVE = 3  # of the following where MLX waits for each operation, as it does on the CPU with a limit on memory
SCORES_ALIVE = 5  # arrays of the size of a block's scores in float32 that the backward pass holds at once


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
    batch, heads, part = _largest_group(problem, device, scores_alive)
    groups = [(b, h) for b in ranges(problem.batch, batch) for h in ranges(problem.kv_heads, heads)]
    blocks = row_blocks(part, device, scores_alive, max(1, device.most_blocks // len(groups)))
    return [HeadGroup(batch=b, heads=h, rows=blocks) for b, h in groups]


def _largest_group(
    problem: AttentionProblem, device: DeviceProfile, scores_alive: int
) -> tuple[int, int, AttentionProblem]:
    """Rows of the batch and key heads of a group of heads, and the problem that it is."""
    rows = min(problem.query_length, device.block_rows)
    batch, heads = problem.batch, problem.kv_heads
    budget = block_budget(problem, device)
    while (batch > 1 or heads > 1) and _block_bytes(problem, batch, heads, rows, scores_alive) > budget:
        batch, heads = ((batch + 1) // 2, heads) if batch > 1 else (1, (heads + 1) // 2)
    return batch, heads, replace(problem, batch=batch, heads=heads * problem.group, kv_heads=heads)


def row_blocks(problem: AttentionProblem, device: DeviceProfile, scores_alive: int, most_blocks: int) -> list[Range]:
    """Blocks of queries [start, stop) whose float32 scores, for all heads of the problem, fit the device's budget.

    most_blocks: where more would be needed, they are as few as that, and larger.
    """
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


def planned_bytes(problem: AttentionProblem, device: DeviceProfile, *, waiting: bool = False) -> int:
    """What a forward and a backward pass may hold on top of their inputs: twice as much for lengths twice as long.

    waiting: for each operation before the next, instead of running ahead as far as memory goes; default False.

    `mx.set_memory_limit` at this much above what is held before makes GPU backends wait instead of running further
    ahead. A dense bias, which has a gradient of its own size, is not counted.
    """
    item = 4 if device.kind == "cpu" else problem.element_bytes
    queries = problem.batch * problem.heads * problem.query_length
    keys = problem.batch * problem.kv_heads * problem.key_length
    saved = queries * (2 * problem.value_dim * item + 3 * 4)  # output, its gradient; log-sum-exp, its gradient, delta
    # Gradients of groups of heads, and those put together; within a group those of keys and values are float32 sums.
    gradients = 2 * item * (queries * problem.head_dim + keys * (problem.head_dim + problem.value_dim))
    # Counted, not listed: whoever looks for the largest batch that fits asks about millions of groups.
    batch, kv_heads, part = _largest_group(problem, device, SCORES_ALIVE)
    groups = -(-problem.batch // batch) * -(-problem.kv_heads // kv_heads)
    sums = 8 * keys * (problem.head_dim + problem.value_dim) // groups
    if problem.relative_bias:
        sums += 2 * 4 * problem.heads * (problem.query_length + problem.key_length)
    heads = batch * kv_heads * problem.group
    rows = row_blocks(part, device, SCORES_ALIVE, max(1, device.most_blocks // groups))[0][1]
    # Where the number of blocks is bounded they outgrow their budget: one that runs and the next must still fit.
    two_blocks = 2 * item * SCORES_ALIVE * heads * rows * problem.widest_range(rows)
    scores = 4 * SCORES_ALIVE * queries * problem.widest_range(min(problem.query_length, device.block_rows))
    alive = max(IN_FLIGHT * block_budget(problem, device), two_blocks)
    if waiting:
        alive = two_blocks * WAITING_ALIVE // (2 * SCORES_ALIVE)
    return saved + gradients + sums + min(scores, alive)


def ranges(length: int, size: int) -> list[Range]:
    """[0, length) in ranges [start, stop) of `size`, the last one smaller if need be."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _block_bytes(problem: AttentionProblem, batch: int, kv_heads: int, rows: int, scores_alive: int) -> int:
    return 4 * scores_alive * batch * kv_heads * problem.group * rows * problem.widest_range(rows)
