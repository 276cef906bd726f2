"""What ranks do in test_communication.py."""

from __future__ import annotations

import os
import time

import mlx.core as mx
import numpy as np

from mlxlm.distributed import regions

PAIRS = [(0, 1), (2, 3)]
CROSSED = [(0, 2), (1, 3)]


def data(rank, shape, dtype=mx.float32):
    values = np.random.default_rng(rank).integers(-8, 9, shape).astype(np.float32)
    return mx.array(values).astype(dtype)


def collectives(world, folder, *groupings):
    """Every operation among all ranks, in pairs and in pairs of non-neighbours."""
    groups = {"all": [range(world.size)], "pairs": PAIRS, "crossed": CROSSED}
    results = [(name, operations(world, name, groups[name])) for name in groupings]
    return {f"{name}/{key}": value for name, result in results for key, value in result.items()}


def operations(world, grouping, groups):
    """What every operation gives in this rank's group."""
    comm = world.comm([tuple(group) for group in groups], grouping)
    mine = data(world.rank, (4, 6))
    result = {
        "ranks": np.array(comm.ranks),
        "sum": comm.sum(mine),
        "large": comm.sum(data(world.rank, (5000,))),
        "half": comm.sum(data(world.rank, (5,), mx.bfloat16)).astype(mx.float32),
        "integers": comm.sum(data(world.rank, (3,), mx.int32)),
        "mean": comm.mean(mine),
        "stack": comm.stack(mine),
        "gather": comm.gather(mine, axis=1),
        "scatter": comm.reduce_scatter(mine),
        "broadcast": comm.broadcast(mine, root=1),
        "rotated": comm.rotate([mine, mine.astype(mx.bfloat16)])[1].astype(mx.float32),
    }
    comm.barrier()
    # Both send much at once before either receives; then the farthest pair of the world, which no ring joins.
    other = 1 - comm.index if comm.size == 2 else (comm.index + comm.size // 2) % comm.size
    big = mx.full((3_000_000,), float(world.rank))
    comm.send(big, other, "big")
    result["big"] = comm.receive(other, "big").mean()
    comm.agree("the same", "a text")
    return result


def gradients(world, folder):
    """f and g around a shared product, parts joined for equal work and for work on data of one's own."""
    comm = world.everyone
    x, weight = data(10, (3, 8)), data(11, (8, 8))
    rows = slice(comm.index * 4, comm.index * 4 + 4)

    def shared(x, mine):
        return (regions.left(comm, regions.entered(comm, x)[:, rows] @ mine) ** 2).sum()

    def equal(x, part):
        return ((x @ regions.joined(comm, part, 1)) ** 2).sum()

    def own(part):
        return ((data(20 + comm.index, (3, 8)) @ regions.collected(comm, part)) ** 2).sum()

    loss, (dx, dweight) = mx.value_and_grad(shared, argnums=(0, 1))(x, weight[rows])
    _, (_, dpart) = mx.value_and_grad(equal, argnums=(0, 1))(x, weight[:, rows])
    return {"loss": loss, "dx": dx, "dweight": dweight, "dpart": dpart, "dsharded": mx.grad(own)(weight[rows])}


def different_texts(world, folder):
    world.everyone.agree("odd" if world.rank == 1 else "even", "the settings")


def different_operations(world, folder):
    """Over links: in a group of their own rather than the world's."""
    comm = world.comm([(0, 1)], "pair")
    comm.native = None
    comm.sum(mx.zeros((2 + world.rank,)), "a sum")


def dies_first(world, folder, who, where):
    """Rank `who` ends while the first rank works alone, or while the others compute together outside all limits."""
    if where == "alone":
        with world.first_alone():
            time.sleep(0.5)
            if world.rank == int(who):
                os._exit(9)
            time.sleep(0.5)
    for _ in range(1000):
        if world.rank == int(who):
            os._exit(9)
        mx.eval(world.everyone.sum(mx.zeros((1000,))))


def dies(world, folder, how):
    """Rank 1 ends in the middle, or stays away; rank 0 waits inside MLX itself."""
    (folder / f"pid{world.rank}").write_text("here")
    if world.rank == 1:
        if how == "raise":
            raise ValueError("a mistake of rank 1")
        if how == "exit":
            os._exit(9)
        time.sleep(60)
    with world.waiting("gradients"):
        mx.eval(world.everyone.sum(mx.zeros((1000,))))
