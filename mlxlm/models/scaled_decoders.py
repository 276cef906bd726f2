"""What the files of families share that are decoders with scaled and tied embeddings, RMSNorms whose scales are stored
as distances from 1, a gated feed-forward, and windows by the type of the layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxlm.layers import (
    AttentionSpec,
    BlockSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    NoNormSpec,
    NoPositionsSpec,
    ResidualSpec,
    RMSNormSpec,
)
from mlxlm.models import layer_types
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.family import Layout
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.layer_types import FULL, WINDOW
from mlxlm.models.weights import Rule, drop, under


def parse_block(hub: HubConfig, activation: str, *, num_kv_heads: int, sandwich: bool) -> BlockSpec:
    """The block of the first generation, or with norms on both sides of each part (sandwich); without positions.

    num_kv_heads: where the config doesn't say.
    """
    dim, head_dim = hub.take("hidden_size"), hub.take("head_dim", default=256)
    norm = RMSNormSpec(dim=dim, eps=hub.take("rms_norm_eps", default=1e-6), offset=1.0)
    bias = hub.take("attention_bias", default=False)
    hub.expect("use_bidirectional_attention", False)
    hub.note("cache_implementation")
    residual = ResidualSpec(norm_in=norm, norm_out=norm) if sandwich else ResidualSpec(norm_in=norm)
    return BlockSpec(
        attention=AttentionSpec(
            dim=dim,
            num_heads=hub.take("num_attention_heads"),
            num_kv_heads=hub.take("num_key_value_heads", default=num_kv_heads),
            head_dim=head_dim,
            causal=True,
            bias=bias,
            output_bias=bias,
            dropout=hub.take("attention_dropout", default=0.0),
        ),
        attention_residual=residual,
        feed_forward=FeedForwardSpec(
            dim=dim, hidden_dim=hub.take("intermediate_size"), activation=activation, gated=True
        ),
        feed_forward_residual=residual,
    )


def parse_model(
    hub: HubConfig,
    classes: tuple[str, str],
    block: BlockSpec,
    windows: tuple[int | None, ...],
    positions: tuple[NoPositionsSpec, ...],
) -> TransformerConfig:
    """The whole decoder: one block a layer with its window and positions, scaled embeddings."""
    dim = block.attention.dim
    return assemble(
        hub,
        classes=classes,
        embeddings=EmbeddingsSpec(vocab_size=hub.take("vocab_size"), dim=dim, scale=dim**0.5),
        layers=(
            replace(block, attention=replace(block.attention, window=window, positions=position))
            for window, position in zip(windows, positions, strict=True)
        ),
        norm=block.attention_residual.norm_in,
        tied=True,
        max_length=hub.take("max_position_embeddings", default=None),
        softcap=hub.take("final_logit_softcapping", default=None),
    )


def parse_windows(hub: HubConfig, pattern: int, default: int) -> tuple[int | None, ...]:
    """The window of each layer by `layer_types`; in older configs every `pattern`-th layer has none."""
    num_layers = hub.take("num_hidden_layers")
    kinds = [FULL if (index + 1) % pattern == 0 else WINDOW for index in range(num_layers)]
    return layer_types.parse_windows(hub, kinds, hub.take("sliding_window", default=default))


def unparse_windows(config: TransformerConfig) -> dict[str, Any]:
    """The config.json keys that say which layers have a window."""
    used = [window for window in layer_types.windows(config) if window is not None]
    return {**({"sliding_window": used[0]} if used else {}), "layer_types": layer_types.unparse_layer_types(config)}


def query_scalar(attention: AttentionSpec) -> float:
    """The config's `query_pre_attn_scalar`, whose root divides the scores; an int wherever it is one."""
    assert attention.scale is not None
    scalar = round(attention.scale**-2, 6)
    return int(scalar) if scalar.is_integer() else scalar


def unparse_model(config: TransformerConfig, model_type: str, classes: tuple[str, str]) -> dict[str, Any]:
    """The config.json keys of all generations, positions and windows excepted."""
    attention = config.stack.layers[0].attention
    return {
        **outer_keys(config, model_type, classes),
        "hidden_size": config.dim,
        "intermediate_size": config.stack.layers[0].feed_forward.hidden_dim,
        "num_hidden_layers": len(config.stack.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": config.stack.norm.eps,
        "attention_bias": attention.bias,
        "attention_dropout": attention.dropout,
        "max_position_embeddings": config.max_length,
    }


def scaled_rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names of all generations; which norms there are tells them apart."""
    where = prefixes(config, "model.")
    sandwich = config.stack.layers[0].attention_residual.norm_out != NoNormSpec()
    names = {f"self_attn.{p[0]}_proj": f"attention.{p}" for p in ("query", "key", "value", "output")}
    names |= {f"self_attn.{p[0]}_norm": f"attention.{p}_norm" for p in ("query", "key")}
    names |= {f"mlp.{p}_proj": f"feed_forward.{p}" for p in ("gate", "up", "down")}
    names["input_layernorm"] = "attention_residual.norm_in"
    if sandwich:
        names["post_attention_layernorm"] = "attention_residual.norm_out"
        names["pre_feedforward_layernorm"] = "feed_forward_residual.norm_in"
        names["post_feedforward_layernorm"] = "feed_forward_residual.norm_out"
    else:
        names["post_attention_layernorm"] = "feed_forward_residual.norm_in"
    return (
        *outer_rules(config, where, token="embed_tokens", norm="norm"),
        *layer_rules(where, "layers.{n}.", names),
        drop(*under(where, "layers.{n}.self_attn.rotary_emb.inv_freq")),
    )
