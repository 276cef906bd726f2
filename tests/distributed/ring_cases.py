"""What ranks do in test_ring_attention.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxlm.distributed.ring_attention import Part, _evaluate_masks, _moved, ring_attention
from mlxlm.kernels import AttentionMask, attention

B, H, K, D, EACH = 2, 4, 2, 8, 10


def masks(length):
    """Masks of whole rows by name."""
    rng = np.random.default_rng(3)
    documents = mx.array(np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32))
    return {
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(causal=True, window=7),
        "both ways, padding": AttentionMask(key_lengths=mx.array([length, EACH // 2])),
        "prefix": AttentionMask(causal=True, prefix_lengths=mx.array([3, EACH + 4])),
        "documents": AttentionMask(causal=True, query_segments=documents, key_segments=documents),
    }


def parts_of(mask, index, size):
    """What rank `index` sees of the keys of every rank."""
    from dataclasses import replace

    found = []
    for number in range(size):
        columns = slice(number * EACH, number * EACH + EACH)
        own = slice(index * EACH, index * EACH + EACH)
        segments = {} if mask.key_segments is None else {
            "query_segments": mask.query_segments[:, own], "key_segments": mask.key_segments[:, columns],
        }  # fmt: skip
        moved = replace(_moved(mask, number * EACH, EACH), query_offset=(index - number) * EACH, **segments)
        skipped = mask.causal and number > index and mask.prefix_lengths is None
        found.append(None if skipped else Part(mask=moved, terms={}))
    _evaluate_masks(found)
    return found


def exact(world, folder):
    """For each mask: how far outputs and gradients are from those of whole rows."""
    comm, length, result = world.everyone, EACH * world.size, {}
    rng = np.random.default_rng(0)
    query, key, value, weight = (
        mx.array(rng.normal(size=(B, heads, length, D)).astype(np.float32)) for heads in (H, K, K, H)
    )
    own = slice(comm.index * EACH, comm.index * EACH + EACH)
    for name, mask in masks(length).items():

        def whole(query, key, value, mask=mask):
            out = attention(query, key, value, mask=mask, softcap=5.0, implementation="reference")
            return (out * weight).sum(), out

        def ring(query, key, value, mask=mask):
            out = ring_attention(comm, query, key, value, parts_of(mask, comm.index, comm.size), softcap=5.0)
            return (out * weight[:, :, own]).sum(), out

        (_, expected), gradients = mx.value_and_grad(whole, argnums=(0, 1, 2))(query, key, value)
        mine = (array[:, :, own] for array in (query, key, value))
        (_, got), found = mx.value_and_grad(ring, argnums=(0, 1, 2))(*mine)
        result[f"{name}/output"] = mx.abs(got - expected[:, :, own]).max()
        result[f"{name}/gradients"] = max(
            float(mx.abs(a - b[:, :, own]).max()) for a, b in zip(found, gradients, strict=True)
        )
    return result


def peak(world, folder, length):
    """Bytes that attention forward and backward takes at most on this rank, for rows of this length."""
    comm, each = world.everyone, int(length) // world.size
    query, key, value = (mx.random.normal((1, 4, each, 32)) for _ in range(3))
    parts = [
        Part(mask=AttentionMask(causal=True, query_offset=(comm.index - number) * each), terms={})
        if number <= comm.index
        else None
        for number in range(comm.size)
    ]
    mx.eval(query, key, value)
    mx.reset_peak_memory()
    loss = mx.grad(lambda *given: ring_attention(comm, *given, parts).square().sum(), argnums=(0, 1, 2))
    mx.eval(loss(query, key, value))
    return {"peak": mx.get_peak_memory()}
