"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219): the LLaMA shape with fused projections and LongRoPE."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from mlxlm.layers.rotary_scaling import LongScalingSpec
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import GATE_UP, QKV, prefixes
from mlxlm.models.family import Family, Layout
from mlxlm.models.gated_decoders import GGUF_KEYS, decoder_rules, parse_decoder, unparse_decoder
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule, split, under


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    window = hub.take("sliding_window", default=None)
    windows = (window,) * hub.take("num_hidden_layers")
    config = parse_decoder(hub, name="Phi3", windows=windows, eps=1e-5, rotary={"partial": 1.0})
    dropout = hub.take("resid_pdrop", default=0.0)
    hub.note("embd_pdrop")  # in no implementation's forward pass
    residual = replace(config.stack.layers[0].attention_residual, dropout=dropout)
    layers = tuple(
        replace(layer, attention_residual=residual, feed_forward_residual=residual) for layer in config.stack.layers
    )
    return replace(config, decoder=replace(config.stack, layers=layers))


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    keys = unparse_decoder(config, model_type="phi3", name="Phi3")
    scaling = block.attention.positions.scaling
    if isinstance(scaling, LongScalingSpec):
        keys["original_max_position_embeddings"] = scaling.original_length
    return {**keys, "sliding_window": block.attention.window, "resid_pdrop": block.attention_residual.dropout}


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names: query, key and value are one tensor, gate and up another."""
    where, block = prefixes(config, "model."), config.stack.layers[0]
    attention, hidden_dim = block.attention, block.feed_forward.hidden_dim
    wide, narrow = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    return (
        split(under(where, "layers.{n}.self_attn.qkv_proj.{p}"), QKV, (wide, narrow, narrow)),
        split(under(where, "layers.{n}.mlp.gate_up_proj.{p}"), GATE_UP, (hidden_dim, hidden_dim)),
        *decoder_rules(config, layout),
    )


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    values["sliding_window"] = header.take("attention.sliding_window", 0) or None  # 0 stands for none


def _write_gguf(config: TransformerConfig) -> dict[str, Any]:
    return {"attention.sliding_window": config.stack.layers[0].attention.window or 0}


GGUF = GgufDialect(
    architecture="phi3",
    model_type="phi3",
    keys=GGUF_KEYS,
    rules=partial(gguf_rules, joined=True, gate_up=True),
    read=_read_gguf,
    write=_write_gguf,
)

FAMILY = Family(name="Phi-3", model_types=("phi3",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
