"""Attention of one token over a cache whose length is known on the device only."""

from __future__ import annotations

import mlx.core as mx

from mlxlm.kernels.one_token.source import Constants, chunk, launch

# Slots of the cache up to which one threadgroup a head reads them all; then one for each SHARE slots, at most MOST.
_ALONE, _SHARE, _MOST = 2048, 512, 32


def serves(head_dim: int, dtype: mx.Dtype) -> str:
    """Why heads of that width have no kernel, empty when they have one."""
    step = chunk(dtype)
    return "" if head_dim % step == 0 and head_dim <= 256 else f"heads of {head_dim} features have no kernel"


def attend(
    query: mx.array,
    keys: mx.array,
    values: mx.array,
    position: mx.array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> mx.array:
    """softmax(scale * query @ keys.T) @ values, (H * D,), over the keys 0 .. position, of which a window sees the last.

    query: (H * D,).  keys, values: (1, Hkv, slots, D).  position: (1,) int32, the slot of the token itself.
    """
    _, kv_heads, slots, dim = keys.shape
    heads = query.size // dim
    each = chunk(query.dtype)
    lanes = 1
    while lanes < 32 and lanes * each < dim:
        lanes *= 2
    parts = -(-dim // (lanes * each))
    splits = 1 if slots <= _ALONE else min(_MOST, -(-slots // _SHARE))
    simdgroups = 32 if dim <= 128 and splits == 1 else 8
    constants: Constants = (
        ("HEAD_DIM", dim), ("GROUP", heads // kv_heads), ("LANES", lanes), ("KEYS", 32 // lanes), ("PARTS", parts),
        ("FLIGHT", 2), ("SIMDGROUPS", simdgroups), ("WINDOW", window or 0), ("SCALE", float(scale)),
        ("HAS_SOFTCAP", int(softcap is not None)), ("SOFTCAP", float(softcap or 0.0)), ("PARTIAL", int(splits > 1)),
    )  # fmt: skip
    inputs = {"query": query, "keys": keys, "values": values, "position": position}
    shapes = {"out": (heads * dim,)} if splits == 1 else {"out": (heads, splits, dim), "weight": (heads, splits, 2)}
    found = launch(
        "attend", query.dtype, constants, inputs, shapes, threadgroups=(heads, splits), simdgroups=simdgroups,
        result=query.dtype if splits == 1 else mx.float32,
    )  # fmt: skip
    if splits == 1:
        return found[0]
    parts_of_heads = dict(zip(("partial", "weight"), found, strict=True))
    return launch(
        "combine", query.dtype, (("HEAD_DIM", dim),), parts_of_heads, {"out": (heads * dim,)},
        threadgroups=(heads, 1), simdgroups=-(-dim // 32),
    )[0]  # fmt: skip
