"""Falcon (Almazrouei et al. 2023, arXiv:2311.16867): attention and feed-forward side by side, one key/value head (7B)
or few (40B), rotary positions or linear biases.
"""

from __future__ import annotations

from typing import Any

from mlxlm.errors import ConfigError, UnsupportedModelError
from mlxlm.layers import (
    AlibiSpec,
    AttentionSpec,
    BlockSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    LayerNormSpec,
    ParallelBlockSpec,
    ResidualSpec,
    RotarySpec,
)
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import QKV, assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.family import Family, Layout
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.rotary_config import parse_rotary, unparse_rotary
from mlxlm.models.weights import Rule, split_heads, under

_CLASSES = ("FalconModel", "FalconForCausalLM")
_SECOND_NORM = "blk.0.attn_norm_2.weight"


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    dim = hub.take("hidden_size", "n_embed")
    heads = hub.take("num_attention_heads", "n_head")
    bias = hub.take("bias", default=False)
    dropout = hub.take("hidden_dropout", default=0.0)
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_epsilon", default=1e-5))
    hub.expect("apply_residual_connection_post_layernorm", False)
    grouped = hub.take("new_decoder_architecture", default=False)
    parts = {
        "attention": AttentionSpec(
            dim=dim,
            num_heads=heads,
            num_kv_heads=_kv_heads(hub, heads, grouped),
            head_dim=dim // heads,
            causal=True,
            positions=_parse_positions(hub, heads, dim // heads),
            bias=bias,
            output_bias=bias,
            dropout=hub.take("attention_dropout", default=0.0),
        ),
        "feed_forward": FeedForwardSpec(
            dim=dim,
            hidden_dim=hub.take("ffn_hidden_size", default=4 * dim),
            activation=hub.activation("activation", default="gelu"),
            bias=bias,
        ),
    }
    num_norms = hub.take("num_ln_in_parallel_attn", default=2 if grouped else 1)
    parallel = hub.take("parallel_attn", default=True)
    if grouped and not parallel:
        raise UnsupportedModelError("config.json: new_decoder_architecture needs parallel_attn")
    if not parallel:
        residual = ResidualSpec(norm_in=norm, dropout=dropout)
        # What attention adds is dropped out at the rate of its probabilities, as in transformers.
        after_attention = ResidualSpec(norm_in=norm, dropout=parts["attention"].dropout)
        block = BlockSpec(**parts, attention_residual=after_attention, feed_forward_residual=residual)
    elif num_norms == 2 and not grouped:
        raise UnsupportedModelError("config.json: num_ln_in_parallel_attn = 2 needs new_decoder_architecture")
    else:
        block = ParallelBlockSpec(
            **parts, norm=norm, feed_forward_norm=norm if num_norms == 2 else None, dropout=dropout
        )
    return assemble(
        hub,
        classes=_CLASSES,
        embeddings=EmbeddingsSpec(vocab_size=hub.take("vocab_size"), dim=dim),
        layers=(block,) * hub.take("num_hidden_layers", "n_layer"),
        norm=norm,
        tied=True,
        spans=True,
        max_length=hub.take("max_position_embeddings", default=2048),
    )


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
    attention = block.attention
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
        split_heads(
            under(where, "h.{n}.self_attention.query_key_value.{p}"),
            QKV,
            attention.num_kv_heads,
            (attention.num_heads // attention.num_kv_heads, 1, 1),
        ),
        *layer_rules(where, "h.{n}.", names),
    )


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    header.expect("tensor_data_layout", "jploski")  # query, key and value one after another
    shared, two_norms = values.setdefault("num_kv_heads", values["num_attention_heads"]), _SECOND_NORM in header.tensors
    values["new_decoder_architecture"] = two_norms or 1 < shared < values["num_attention_heads"]
    values["num_ln_in_parallel_attn"] = 2 if two_norms else 1
    values["multi_query"] = shared == 1
    values["bias"] = "blk.0.attn_qkv.bias" in header.tensors


def _gguf_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    """Weight names in a GGUF file: with two norms, that of the feed-forward has the name of the only one elsewhere."""
    two = getattr(config.stack.layers[0], "feed_forward_norm", None) is not None
    norms = {"attn_norm_2": "norm", "attn_norm": "feed_forward_norm"} if two else None
    return gguf_rules(config, joined=True, norms=norms)


GGUF = GgufDialect(
    architecture="falcon",
    model_type="falcon",
    keys={
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "ffn_hidden_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_kv_heads",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    rules=_gguf_rules,
    read=_read_gguf,
    write=lambda config: {"tensor_data_layout": "jploski"},
)

FAMILY = Family(name="Falcon", model_types=("falcon",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
