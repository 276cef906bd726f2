"""Communication inside what is differentiated: the operators of a region whose work is shared.

A region begins with f and ends with g (Shoeybi et al. 2019, arXiv:1909.08053, section 3): f passes x on and sums its
gradients over the ranks, g sums its input over the ranks and passes gradients on. Between them every rank does a part
of the work on the same x.
"""

from __future__ import annotations

import mlx.core as mx

from mlxlm.distributed.communicator import Comm


def entered(comm: Comm, x: mx.array) -> mx.array:
    """f: x, which is the same on all ranks, for work that they share; its gradient is the sum of theirs."""
    if comm.size == 1:
        return x

    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return x

    @run.vjp
    def run_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return comm.sum(cotangent, "gradient of a shared region's input")

    return run(x)


def left(comm: Comm, x: mx.array) -> mx.array:
    """g: the sum over the ranks of what each made; the gradient of each part is that of the sum."""
    if comm.size == 1:
        return x

    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return comm.sum(x, "output of a shared region")

    @run.vjp
    def run_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return cotangent

    return run(x)


def joined(comm: Comm, x: mx.array, axis: int = 0) -> mx.array:
    """The parts of all ranks one after another, for work that all do alike; the gradient is this rank's part."""
    if comm.size == 1:
        return x
    axis %= x.ndim

    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return comm.gather(x, axis, "parts of all ranks")

    @run.vjp
    def run_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        start = comm.index * x.shape[axis]
        return mx.take(cotangent, mx.arange(start, start + x.shape[axis]), axis=axis)

    return run(x)


def collected(comm: Comm, x: mx.array) -> mx.array:
    """The parts of all ranks along the first axis, for work that each does on data of its own: the gradient is this
    rank's part of the sum of theirs.
    """
    if comm.size == 1:
        return x

    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return comm.gather(x, 0, "sharded weights")

    @run.vjp
    def run_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return comm.reduce_scatter(cotangent, "gradients of sharded weights")

    return run(x)
