"""Many arrays at once over ranks: put together in buckets, so that a few large messages are sent and no small ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx

from mlxlm.distributed.communicator import Comm

Arrays = dict[str, mx.array]

BUCKET_BYTES = 32 * 1024**2


def summed(comm: Comm, arrays: Mapping[str, mx.array], *, bucket_bytes: int = BUCKET_BYTES) -> Arrays:
    """The sum over the ranks of each array; all ranks have the same names, shapes and dtypes in the same order.

    The last arrays, whose gradients a backward pass has first, are sent first.
    """
    if comm.size == 1 or not arrays:
        return dict(arrays)
    found: Arrays = {}
    for names in _buckets(arrays, bucket_bytes):
        total = comm.sum(mx.concatenate([arrays[name].reshape(-1) for name in names]), "gradients")
        found |= {name: part.reshape(arrays[name].shape) for name, part in _parts(total, arrays, names)}
    return {name: found[name] for name in arrays}


def gathered(comm: Comm, shards: Mapping[str, mx.array], *, bucket_bytes: int = BUCKET_BYTES) -> Arrays:
    """The shards of all ranks one below the other, for each array: (n, ...) -> (size * n, ...)."""
    if comm.size == 1 or not shards:
        return dict(shards)
    found: Arrays = {}
    for names in _buckets(shards, bucket_bytes):
        every = comm.stack(mx.concatenate([shards[name].reshape(-1) for name in names]), "sharded weights")
        found |= {name: part.reshape(-1, *shards[name].shape[1:]) for name, part in _parts(every, shards, names)}
    return {name: found[name] for name in shards}


def scattered(comm: Comm, arrays: Mapping[str, mx.array], *, bucket_bytes: int = BUCKET_BYTES) -> Arrays:
    """This rank's shard of the sum over the ranks of each array: (size * n, ...) -> (n, ...)."""
    if comm.size == 1 or not arrays:
        return dict(arrays)
    found: Arrays = {}
    for names in _buckets(arrays, bucket_bytes):
        rows = mx.concatenate([arrays[name].reshape(comm.size, -1) for name in names], axis=1)
        own = comm.reduce_scatter(rows, "gradients of sharded weights")[0]
        start = 0
        for name in names:
            end = start + arrays[name].size // comm.size
            found[name] = own[start:end].reshape(-1, *arrays[name].shape[1:])
            start = end
    return {name: found[name] for name in arrays}


def _parts(joined: mx.array, arrays: Mapping[str, mx.array], names: list[str]) -> Iterator[tuple[str, mx.array]]:
    """What the last axis of a bucket holds for each array."""
    start = 0
    for name in names:
        end = start + arrays[name].size
        yield name, joined[..., start:end]
        start = end


def _buckets(arrays: Mapping[str, mx.array], limit: int) -> list[list[str]]:
    """Names in buckets of one dtype and of at most `limit` bytes, unless a single array is larger; the last first."""
    buckets: list[list[str]] = []
    size = 0
    for name in reversed(list(arrays)):
        array = arrays[name]
        if buckets and arrays[buckets[-1][-1]].dtype == array.dtype and size + array.nbytes <= limit:
            buckets[-1].append(name)
            size += array.nbytes
        else:
            buckets.append([name])
            size = array.nbytes
    return buckets
