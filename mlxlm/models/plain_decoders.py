"""What the files of families share that are decoders with pre-normed blocks, whole attention in every layer and query,
key and value in one fused weight: the block, that weight's rules and the usual GGUF keys.
"""

from __future__ import annotations

from typing import Any

from mlxlm.errors import ConfigError
from mlxlm.layers import AttentionSpec, BlockSpec, FeedForwardSpec, NormSpec, ParallelBlockSpec, ResidualSpec
from mlxlm.models.decoders import QKV
from mlxlm.models.weights import Rule, split, split_heads


def plain_block(
    norm: NormSpec,
    *,
    heads: int,
    hidden_dim: int,
    activation: str,
    bias: bool,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    fused_bias: bool | None = None,
    gated: bool = False,
    from_normed: bool = False,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    **attention: Any,
) -> BlockSpec:
    """Attention and feed-forward in turn, each with a norm before it.

    norm: of both, and as wide as the model.  bias: on every projection.  fused_bias: on query, key and value, default
    as elsewhere.  kv_heads, head_dim: default heads and width / heads.  from_normed: of both residuals.  dropout: of
    what they add.  attention_dropout: of the attention probabilities.  attention: more arguments of `AttentionSpec`,
    such as positions.
    """
    dim: int = norm.dim  # type: ignore[attr-defined]
    residual = ResidualSpec(norm_in=norm, from_normed=from_normed, dropout=dropout)
    spec = {
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": dim // heads if head_dim is None else head_dim,
        "bias": bias if fused_bias is None else fused_bias,
        "output_bias": bias,
        "dropout": attention_dropout,
    }
    return BlockSpec(
        attention=AttentionSpec(dim=dim, num_heads=heads, causal=True, **(spec | attention)),
        attention_residual=residual,
        feed_forward=FeedForwardSpec(dim=dim, hidden_dim=hidden_dim, activation=activation, gated=gated, bias=bias),
        feed_forward_residual=residual,
    )


def side_by_side(block: BlockSpec, *, norms: int) -> ParallelBlockSpec:
    """The same parts on the same input. norms: 1 that both share, or 2, one each."""
    residual = block.feed_forward_residual
    return ParallelBlockSpec(
        attention=block.attention,
        feed_forward=block.feed_forward,
        norm=residual.norm_in,
        feed_forward_norm=residual.norm_in if norms == 2 else None,
        dropout=residual.dropout,
    )


def fused_in_turn(hub: str | tuple[str, ...], attention: AttentionSpec, **options: Any) -> Rule:
    """Query, key and value stored as one, all heads of each one after another. options: of `split`."""
    wide, narrow = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    return split(hub, QKV, (wide, narrow, narrow), **options)


def fused_by_group(hub: str | tuple[str, ...], attention: AttentionSpec) -> Rule:
    """Query, key and value stored as one: the queries of each key/value head, then its key and its value."""
    groups = attention.num_kv_heads
    return split_heads(hub, QKV, groups, (attention.num_heads // groups, 1, 1))


def logit_scale(value: float | str | None, dim: int) -> float:
    """What logits are multiplied by: a number, 1 where there is none, or "inv_sqrt_d_model" for dim ** -0.5."""
    if value == "inv_sqrt_d_model":
        return dim**-0.5
    if isinstance(value, str):
        raise ConfigError(f"config.json: logit_scale = {value!r}, expected a number or 'inv_sqrt_d_model'")
    return 1.0 if value is None else float(value)


def gguf_keys(**names: str) -> dict[str, str]:
    """GGUF metadata, without the architecture -> config.json, of the names that the family gives to these.

    names: length, width, hidden, layers, heads, kv_heads, head_dim, eps (of LayerNorm), rms_eps.
    """
    return {_GGUF_NAMES[name]: hub for name, hub in names.items()}


_GGUF_NAMES = {
    "length": "context_length",
    "width": "embedding_length",
    "hidden": "feed_forward_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "eps": "attention.layer_norm_epsilon",
    "rms_eps": "attention.layer_norm_rms_epsilon",
}
