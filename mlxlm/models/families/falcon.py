"""Falcon (Almazrouei et al. 2023, arXiv:2311.16867): attention and feed-forward side by side, one key/value head (7B)
or few (40B), rotary positions or linear biases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxlm.errors import ConfigError, UnsupportedModelError
from mlxlm.layers import AlibiSpec, BlockSpec, EmbeddingsSpec, LayerNormSpec, ParallelBlockSpec, RotarySpec
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.families.falcon_gguf import GGUF
from mlxlm.models.family import Family, Layout
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.plain_decoders import fused_by_group, plain_block, side_by_side
from mlxlm.models.rotary_config import parse_rotary, unparse_rotary
from mlxlm.models.weights import Rule, under

_CLASSES = ("FalconModel", "FalconForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    dim = hub.take("hidden_size", "n_embed")
    heads = hub.take("num_attention_heads", "n_head")
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_epsilon", default=1e-5))
    return assemble(
        hub,
        classes=_CLASSES,
        embeddings=EmbeddingsSpec(vocab_size=hub.take("vocab_size"), dim=dim),
        layers=(_parse_block(hub, norm, heads),) * hub.take("num_hidden_layers", "n_layer"),
        norm=norm,
        tied=True,
        spans=True,
        max_length=hub.take("max_position_embeddings", default=2048),
    )


def _parse_block(hub: HubConfig, norm: LayerNormSpec, heads: int) -> BlockSpec | ParallelBlockSpec:
    hub.expect("apply_residual_connection_post_layernorm", False)
    grouped = hub.take("new_decoder_architecture", default=False)
    block = plain_block(
        norm,
        heads=heads,
        kv_heads=_kv_heads(hub, heads, grouped),
        hidden_dim=hub.take("ffn_hidden_size", default=4 * norm.dim),
        activation=hub.activation("activation", default="gelu"),
        bias=hub.take("bias", default=False),
        dropout=hub.take("hidden_dropout", default=0.0),
        attention_dropout=hub.take("attention_dropout", default=0.0),
        positions=_parse_positions(hub, heads, norm.dim // heads),
    )
    num_norms = hub.take("num_ln_in_parallel_attn", default=2 if grouped else 1)
    parallel = hub.take("parallel_attn", default=True)
    if grouped and not parallel:
        raise UnsupportedModelError("config.json: new_decoder_architecture needs parallel_attn")
    if not parallel:
        # What attention adds is dropped out at the rate of its probabilities, as in transformers.
        after_attention = replace(block.attention_residual, dropout=block.attention.dropout)
        return replace(block, attention_residual=after_attention)
    if num_norms == 2 and not grouped:
        raise UnsupportedModelError("config.json: num_ln_in_parallel_attn = 2 needs new_decoder_architecture")
    return side_by_side(block, norms=2 if num_norms == 2 else 1)


def _kv_heads(hub: HubConfig, heads: int, grouped: bool) -> int:
    given = hub.take("num_kv_heads", "n_head_kv", default=heads)
    multi_query = hub.take("multi_query", default=True)
    if grouped:
        return given
    if not multi_query and given != heads:
        raise ConfigError(f"config.json: {given} key/value heads need new_decoder_architecture or multi_query")
    return 1 if multi_query else heads


def _parse_positions(hub: HubConfig, heads: int, head_dim: int) -> RotarySpec | AlibiSpec:
    rotary = parse_rotary(hub, head_dim)  # written to every config, in use or not
    if hub.take("alibi", default=False):
        # The biases were added before the sum was divided, in bfloat16.
        return AlibiSpec(num_heads=heads, divisor=head_dim**0.5, rounded=True)
    return rotary


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    attention = block.attention
    parallel = isinstance(block, ParallelBlockSpec)
    grouped = parallel and (
        block.feed_forward_norm is not None or attention.num_kv_heads not in (1, attention.num_heads)
    )
    alibi = isinstance(attention.positions, AlibiSpec)
    return {
        **outer_keys(config, "falcon", _CLASSES),
        "hidden_size": config.dim,
        "ffn_hidden_size": block.feed_forward.hidden_dim,
        "num_hidden_layers": len(config.stack.layers),
        "num_attention_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "new_decoder_architecture": grouped,
        "multi_query": attention.num_kv_heads == 1,
        "parallel_attn": parallel,
        "num_ln_in_parallel_attn": (2 if block.feed_forward_norm is not None else 1) if parallel else None,
        "activation": hub_activation(block.feed_forward.activation),
        "bias": attention.bias,
        "alibi": alibi,
        "max_position_embeddings": config.max_length,
        "layer_norm_epsilon": config.stack.norm.eps,
        "attention_dropout": attention.dropout,
        "hidden_dropout": block.dropout if parallel else block.feed_forward_residual.dropout,
        **({} if alibi else unparse_rotary(attention.positions, attention.head_dim)),
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names. Query, key and value are one tensor, group by group; the norms' names say how they are used."""
    where, block = prefixes(config, "transformer."), config.stack.layers[0]
    names = {
        "self_attention.dense": "attention.output",
        "mlp.dense_h_to_4h": "feed_forward.up",
        "mlp.dense_4h_to_h": "feed_forward.down",
    }
    if not isinstance(block, ParallelBlockSpec):
        names["input_layernorm"] = "attention_residual.norm_in"
        names["post_attention_layernorm"] = "feed_forward_residual.norm_in"
    elif block.feed_forward_norm is None:
        names["input_layernorm"] = "norm"
    else:
        names |= {"ln_attn": "norm", "ln_mlp": "feed_forward_norm"}
    return (
        *outer_rules(config, where, token="word_embeddings", norm="ln_f", tokens_head="classifier"),
        fused_by_group(under(where, "h.{n}.self_attention.query_key_value.{p}"), block.attention),
        *layer_rules(where, "h.{n}.", names),
    )


FAMILY = Family(name="Falcon", model_types=("falcon",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
