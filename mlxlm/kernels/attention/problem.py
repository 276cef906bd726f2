"""From the arguments of a call to the static description that the planner works with."""

from __future__ import annotations

import mlx.core as mx

from mlxlm.kernels.attention.mask import AttentionMask
from mlxlm.kernels.attention.plan import AttentionProblem


def describe(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: AttentionMask,
    *,
    alibi_slopes: mx.array | None = None,
    relative_bias: mx.array | None = None,
    bias: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    dropout: float = 0.0,
    dropout_key: mx.array | None = None,
    return_lse: bool = False,
) -> AttentionProblem:
    """The problem that these arguments of `attention` pose; looks at shapes and kinds only, evaluates nothing."""
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = value.shape[1:]
    offset = mask.offset(query_length, key_length)
    return AttentionProblem(
        dtype=str(query.dtype).removeprefix("mlx.core."),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        value_dim=value_dim,
        causal=mask.causal,
        window=mask.window,
        query_offset=offset if isinstance(offset, int) else None,
        prefix=mask.prefix_lengths is not None,
        lengths=mask.key_lengths is not None,
        segments=mask.query_segments is not None,
        alibi=alibi_slopes is not None,
        relative_bias=relative_bias is not None,
        bias=bias is not None,
        softcap=softcap is not None,
        sinks=sinks is not None,
        dropout=dropout > 0.0,
        return_lse=return_lse,
    )
