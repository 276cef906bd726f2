"""Virtual tokens: vectors, or keys and values, that stand before the first real token of a row.

A model reads them through one hook, `Transformer.prompt`, a `VirtualTokens` module; `Prefix` is what a single attention
layer is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
from mlx import nn

from mlxlm.kernels import AttentionMask, attention

StackName = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Prefix:
    """Keys and values that a layer sees before those of the tokens, each (1 or B, Hkv, v, D), not turned by positions.

    key, value: of self-attention, None for none.  memory_key, memory_value: of cross-attention.
    """

    key: mx.array | None = None
    value: mx.array | None = None
    memory_key: mx.array | None = None
    memory_value: mx.array | None = None

    def arrays(self) -> list[mx.array | None]:
        """The four arrays in order, for what must pass them as arguments."""
        return [self.key, self.value, self.memory_key, self.memory_value]


class VirtualTokens(nn.Module):
    """What a model reads before the tokens of every row. The real tokens stand at positions length, length + 1 ...

    length: virtual tokens of a row.  A subclass overrides `vectors`, `prefixes` or both.
    """

    length: int = 0

    def offset(self, stack: StackName) -> int:
        """Position of the first real token in a stack: all virtual tokens by default."""
        return self.length

    def vectors(self, stack: StackName) -> mx.array | None:
        """(length, dim) instead of token embeddings at the start of a stack's rows, or None for none there."""
        return None

    def prefixes(self, stack: StackName) -> list[Prefix] | None:
        """What each layer of a stack is given, or None for nothing there."""
        return None


def before(prefix: mx.array, held: mx.array) -> mx.array:
    """Keys or values (B, Hkv, L, D) with a prefix (1 or B, Hkv, v, D) in front, in the dtype of those held."""
    prefix = mx.broadcast_to(prefix.astype(held.dtype), (held.shape[0], *prefix.shape[1:]))
    return mx.concatenate([prefix, held], axis=2)


def shifted(mask: AttentionMask, count: int) -> AttentionMask:
    """The mask of tokens that have `count` keys before them which all of them may see."""
    if not count:
        return mask
    return replace(
        mask,
        key_lengths=None if mask.key_lengths is None else mask.key_lengths + count,
        prefix_lengths=None if mask.prefix_lengths is None else mask.prefix_lengths + count,
    )


def attend_in_segments(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    *,
    count: int,
    positions: mx.array,
    mask: AttentionMask,
    scale: float,
    softcap: float | None,
) -> mx.array:
    """Attention of packed rows whose first `count` keys belong to every document, (B, H, L, D).

    query (B, H, L, D); key, value (B, Hkv, count + L, D).  positions (1 or B, L): of the queries, counted with the
    virtual tokens; they decide what a window still sees.  mask: of the L tokens among themselves.

    A mask gives each key one document, so both kinds of keys are attended apart and joined by their normalisers: with
    Z_p, Z_t the sums of exponentials, out = (Z_p out_p + Z_t out_t) / (Z_p + Z_t). Scores with the prefix are made as
    a whole, O(L count).
    """
    B, H, L, D = query.shape
    K = key.shape[1]
    inside, lse_t = attention(
        query, key[:, :, count:], value[:, :, count:], scale=scale, softcap=softcap, mask=mask, return_lse=True
    )
    query_BKGLD = query.reshape(B, K, H // K, L, D).astype(mx.float32)
    key_BK1VD = key[:, :, None, :count].astype(mx.float32)
    score = (scale * query_BKGLD) @ key_BK1VD.swapaxes(-1, -2)
    if softcap is not None:
        score = softcap * mx.tanh(score / softcap)
    if mask.window is not None:
        seen = mx.arange(count) > positions[..., None] - mask.window
        score = mx.where(seen[:, None, None], score, -mx.inf)
    score = score.reshape(B, H, L, count)
    # A query that sees no token (padding) has lse +inf and output 0: it keeps that.
    lse_p = mx.logsumexp(score, axis=-1)
    empty = lse_t == mx.inf
    tokens = mx.where(empty, 0.0, lse_t)
    total = mx.logaddexp(lse_p, tokens)
    weight = mx.exp(score - total[..., None]).reshape(B, K, H // K, L, count)
    outside = (weight @ value[:, :, None, :count].astype(mx.float32)).reshape(B, H, L, -1)
    joined = outside + mx.exp(tokens - total)[..., None] * inside.astype(mx.float32)
    return mx.where(empty[..., None], 0.0, joined).astype(query.dtype)
