"""Sharded data parallelism: what every replica would hold alike is held by one of them each.

Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO). A parameter's rows are shared among the replicas as evenly as can be,
the last ones filled up with zeros so that all shards have the same shape.
Stage 1: the optimizer's state and the trained weights that it works on are shards; the weights are gathered for every
batch. Stage 2: gradients too are kept as shards from batch to batch. Stage 3: a layer's weights are gathered when the
layer runs, forward and backward, and let go after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.distributed.buckets import gathered, scattered
from mlxlm.distributed.communicator import Comm
from mlxlm.distributed.pieces import Piece, own_memory
from mlxlm.layers.block import Block, ParallelBlock
from mlxlm.models import Transformer

Arrays = dict[str, mx.array]


def shard(comm: Comm, array: mx.array) -> mx.array:
    """This rank's rows (ceil(n / size), ...) of an array (n, ...)."""
    each = _each(comm, array.shape[0])
    return _filled(array, comm)[comm.index * each : (comm.index + 1) * each]


def shard_piece(comm: Comm, piece: Piece) -> Piece:
    """What of a piece the rows of `shard` are, without those that only fill up."""
    return shard_piece_at(comm.index, comm.size, piece)


def shard_piece_at(index: int, size: int, piece: Piece) -> Piece:
    """`shard_piece` of one of `size` ranks."""
    each = -(-piece.size[0] // size)
    return piece.within(0, index * each, (index + 1) * each)


def whole(comm: Comm, shards: Arrays, rows: Mapping[str, int]) -> Arrays:
    """The arrays of so many rows each, from the shards of all ranks."""
    return {name: array[: rows[name]] for name, array in gathered(comm, shards).items()}


def shards_of_sum(comm: Comm, arrays: Arrays) -> Arrays:
    """This rank's shard of the sum of every rank's arrays."""
    return scattered(comm, {name: _filled(array, comm) for name, array in arrays.items()})


def assembled(comm: Comm, shards: Arrays, rows: Mapping[str, int]) -> Arrays:
    """`whole`, whose gradients are this rank's shards of the sum of all ranks' gradients."""

    @mx.custom_function
    def run(shards: Arrays) -> Arrays:
        return whole(comm, shards, rows)

    @run.vjp
    def run_vjp(shards: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        return shards_of_sum(comm, cotangents)

    return run(shards)


class _Gathering:
    """A layer of stage 3: its arrays are shards, but while it runs."""

    def __call__(self, *arguments: Any) -> mx.array:
        """See the class that it shards. To let its weights go, its activations must be computed again for gradients."""
        held = dict(tree_flatten(self.parameters()))
        trained = dict(tree_flatten(self.trainable_parameters()))
        frozen = {name: array for name, array in held.items() if name not in trained}
        arrays = assembled(self._comm, trained, self._rows) if trained else {}
        # One communication waits for the one before it, which may be differentiated; quantized weights can't be.
        arrays |= {name: mx.stop_gradient(array) for name, array in whole(self._comm, frozen, self._rows).items()}
        self.update(tree_unflatten(list(arrays.items())))
        try:
            return super().__call__(*arguments)
        finally:
            self.update(tree_unflatten(list(held.items())))


class ShardedBlock(_Gathering, Block):
    """See `_Gathering`."""


class ShardedParallelBlock(_Gathering, ParallelBlock):
    """See `_Gathering`."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {Block: ShardedBlock, ParallelBlock: ShardedParallelBlock}


def shard_layers(model: Transformer, comm: Comm) -> set[str]:
    """Keep this rank's shard of all arrays in the layers of a model, in place; their names."""
    names = set()
    model._alone = False
    for stack in ("encoder", "decoder"):
        for number, layer in enumerate(getattr(model, stack).layers if hasattr(model, stack) else ()):
            if type(layer) not in _KINDS:
                continue
            arrays = dict(tree_flatten(layer.parameters()))
            layer.__class__ = _KINDS[type(layer)]
            layer._comm, layer._rows = comm, {name: array.shape[0] for name, array in arrays.items()}
            for name, array in arrays.items():
                own = _read_shard(model, comm, array)
                mx.eval(own)
                layer.update(tree_unflatten([(name, own)]))
            names |= {f"{stack}.layers.{number}.{name}" for name in arrays}
    return names


def _read_shard(model: Transformer, comm: Comm, array: mx.array) -> mx.array:
    """`shard` of an array of the model; of one that is on disk nothing else is read."""
    if model._stored is not None and array.shape[0] >= comm.size:
        mine = shard_piece(comm, Piece.whole(array.shape))
        read = model._stored.part(array, mine.start, mine.stop)
        if read is not None:
            return mx.pad(read, [(0, _each(comm, array.shape[0]) - read.shape[0]), *[(0, 0)] * (read.ndim - 1)])
    return own_memory(shard(comm, array))


def _each(comm: Comm, rows: int) -> int:
    return -(-rows // comm.size)


def _filled(array: mx.array, comm: Comm) -> mx.array:
    """With rows of zeros, up to a number that the ranks can share evenly."""
    extra = _each(comm, array.shape[0]) * comm.size - array.shape[0]
    return mx.pad(array, [(0, extra), *[(0, 0)] * (array.ndim - 1)]) if extra else array
