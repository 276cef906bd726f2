"""BLOOM (BigScience 2022, arXiv:2211.05100): pre-LayerNorm, a norm after the embeddings too, linear biases for
positions, biases everywhere, tanh-GELU, tied head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mlxlm.layers import AlibiSpec, EmbeddingsSpec, LayerNormSpec
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.family import Family, Layout
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.plain_decoders import fused_by_group, gguf_keys, plain_block
from mlxlm.models.weights import Rule, rename, under

_CLASSES = ("BloomModel", "BloomForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    # `n_embed` comes first: where both are present it is the one in use.
    dim, heads = hub.take("n_embed", "hidden_size", default=64), hub.take("n_head", "num_attention_heads", default=8)
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_epsilon", default=1e-5))
    block = plain_block(
        norm,
        heads=heads,
        hidden_dim=4 * dim,
        activation="gelu_tanh",
        bias=True,
        from_normed=hub.take("apply_residual_connection_post_layernorm", default=False),
        dropout=hub.take("hidden_dropout", default=0.0),
        attention_dropout=hub.take("attention_dropout", default=0.0),
        positions=AlibiSpec(num_heads=heads),
    )
    hub.expect("n_inner", 4 * dim)
    # How the training was split and fused, and what its data was padded to.
    hub.note("pretraining_tp", "slow_but_exact", "bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add")
    hub.note("skip_bias_add_qkv", "attention_softmax_in_fp32", "offset_alibi", "unk_token_id")
    return assemble(
        hub,
        classes=_CLASSES,
        embeddings=EmbeddingsSpec(vocab_size=hub.take("vocab_size"), dim=dim, norm=norm),
        layers=(block,) * hub.take("n_layer", "num_hidden_layers", default=2),
        norm=norm,
        tied=True,
        spans=True,
        max_length=hub.take("seq_length", default=None),
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    return {
        **outer_keys(config, "bloom", _CLASSES),
        "hidden_size": config.dim,
        "n_layer": len(config.stack.layers),
        "n_head": block.attention.num_heads,
        "layer_norm_epsilon": config.stack.norm.eps,
        "apply_residual_connection_post_layernorm": block.attention_residual.from_normed,
        "attention_dropout": block.attention.dropout,
        "hidden_dropout": block.attention_residual.dropout,
        **({} if config.max_length is None else {"seq_length": config.max_length}),
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names. Query, key and value are one tensor, head by head."""
    where, attention = prefixes(config, "transformer."), config.stack.layers[0].attention
    names = {
        "self_attention.dense": "attention.output",
        "mlp.dense_h_to_4h": "feed_forward.up",
        "mlp.dense_4h_to_h": "feed_forward.down",
        "input_layernorm": "attention_residual.norm_in",
        "post_attention_layernorm": "feed_forward_residual.norm_in",
    }
    return (
        *outer_rules(config, where, token="word_embeddings", norm="ln_f", tokens_head="classifier"),
        rename(under(where, "word_embeddings_layernorm.{p}"), "embeddings.norm.{p}"),
        fused_by_group(under(where, "h.{n}.self_attention.query_key_value.{p}"), attention),
        *layer_rules(where, "h.{n}.", names),
    )


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    header.expect("feed_forward_length", 4 * values["hidden_size"])
    header.expect("attention.head_count_kv", values["n_head"])


def _write_gguf(config: TransformerConfig) -> dict[str, Any]:
    heads = config.stack.layers[0].attention.num_heads
    return {"feed_forward_length": 4 * config.dim, "attention.head_count_kv": heads}


GGUF = GgufDialect(
    architecture="bloom",
    model_type="bloom",
    keys=gguf_keys(
        length="seq_length", width="hidden_size", layers="n_layer", heads="n_head", eps="layer_norm_epsilon"
    ),
    rules=partial(gguf_rules, joined=True),
    rotary=False,
    read=_read_gguf,
    write=_write_gguf,
)

FAMILY = Family(name="BLOOM", model_types=("bloom",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
