"""Attention as the contract states it: dense, in float32, differentiated by MLX itself. The oracle of all others.

Shapes: B batch, H query heads, K key/value heads, G = H / K, L queries, S keys, D and E head widths.
"""

from __future__ import annotations

import mlx.core as mx

from mlxlm.kernels.attention.dropout import keep_mask
from mlxlm.kernels.attention.mask import AttentionMask


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    *,
    scale: float,
    mask: AttentionMask,
    alibi_slopes: mx.array | None = None,
    relative_bias: mx.array | None = None,
    bias: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    dropout: float = 0.0,
    dropout_key: mx.array | None = None,
    return_lse: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention with every option of `mlxlm.kernels.attention`, holding (B, H, Lq, Lk) scores in float32.

    query (B, H, Lq, D), key (B, K, Lk, D), value (B, K, Lk, E) -> (B, H, Lq, E) in the dtype of the query, and with
    return_lse also the natural logarithm of the sum of exponentials of each row, float32 (B, H, Lq).
    """
    B, H, L, _ = query.shape
    K, S, E = value.shape[1:]
    query_BKGLD = query.astype(mx.float32).reshape(B, K, H // K, L, -1)
    key_BKGSD = key.astype(mx.float32)[:, :, None]
    value_BKGSE = value.astype(mx.float32)[:, :, None]

    score_BHLS = (scale * (query_BKGLD @ key_BKGSD.swapaxes(-1, -2))).reshape(B, H, L, S)
    if softcap is not None:
        score_BHLS = softcap * mx.tanh(score_BHLS / softcap)
    if alibi_slopes is not None:
        distance_BLS = mx.abs(mask.query_positions(L, S)[:, :, None] - mx.arange(S))
        score_BHLS = score_BHLS - alibi_slopes.astype(mx.float32)[:, None, None] * distance_BLS[:, None]
    if relative_bias is not None:
        diagonal_LS = mx.arange(S) - mx.arange(L)[:, None] + (L - 1)
        score_BHLS = score_BHLS + relative_bias.astype(mx.float32)[:, diagonal_LS]
    if bias is not None:
        score_BHLS = score_BHLS + bias.astype(mx.float32)
    visible = mask.dense(B, L, S)
    if visible is not None:
        score_BHLS = mx.where(visible, score_BHLS, -mx.inf)

    # The softmax does not depend on the maximum that is subtracted, so no gradient flows through it.
    top_BHL1 = mx.stop_gradient(score_BHLS.max(-1, keepdims=True))
    empty_BHL1 = top_BHL1 == -mx.inf
    if sinks is not None:
        sink_H11 = sinks.astype(mx.float32)[:, None, None]
        top_BHL1 = mx.maximum(top_BHL1, mx.stop_gradient(sink_H11))
    top_BHL1 = mx.where(mx.abs(top_BHL1) == mx.inf, 0.0, top_BHL1)
    weight_BHLS = mx.exp(score_BHLS - top_BHL1)
    total_BHL1 = weight_BHLS.sum(-1, keepdims=True)
    if sinks is not None:
        total_BHL1 = total_BHL1 + mx.exp(sink_H11 - top_BHL1)
    # Both `where` keep 0/0 and log(0) out of the gradients of rows that see no key.
    total_BHL1 = mx.where(empty_BHL1, 1.0, total_BHL1)
    weight_BHLS = weight_BHLS / total_BHL1
    if dropout > 0.0:
        kept = keep_mask(dropout_key, dropout, B, H, (0, L), (0, S))
        weight_BHLS = mx.where(kept, weight_BHLS / (1.0 - dropout), 0.0)
    out = (weight_BHLS.reshape(B, K, H // K, L, S) @ value_BKGSE).reshape(B, H, L, E).astype(query.dtype)
    if not return_lse:
        return out
    lse_BHL1 = mx.where(empty_BHL1, mx.inf, top_BHL1 + mx.log(total_BHL1))
    return out, lse_BHL1.squeeze(-1)
