"""Gemma (Gemma Team 2024, arXiv:2403.08295): pre-RMSNorm with scales stored as distances from 1, GeGLU, scaled and
tied embeddings.
"""

from __future__ import annotations

from typing import Any

from mlxlm.errors import ConfigError
from mlxlm.models.config import TransformerConfig
from mlxlm.models.family import Family
from mlxlm.models.gated_decoders import GGUF_KEYS
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.rotary_config import parse_rotary, unparse_rotary
from mlxlm.models.scaled_decoders import parse_block, parse_model, scaled_rules, unparse_model

_CLASSES = ("GemmaModel", "GemmaForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    block = parse_block(hub, _activation(hub), num_kv_heads=16, sandwich=False)
    num_layers = hub.take("num_hidden_layers")
    positions = parse_rotary(hub, block.attention.head_dim)
    return parse_model(hub, _CLASSES, block, (None,) * num_layers, (positions,) * num_layers)


def _activation(hub: HubConfig) -> str:
    """Of two keys, of which transformers 4 prefers one and 5 reads the other."""
    names = [hub.activation(key, default="gelu") for key in ("hidden_activation", "hidden_act")]
    # The first releases say "gelu" and mean its approximation, as every implementation reads it.
    newer, older = ("gelu_tanh" if name == "gelu" else name for name in names)
    if newer != older and hub.values.get("hidden_activation") and hub.values.get("hidden_act"):
        raise ConfigError(
            f"config.json contradicts itself: hidden_activation is {hub.values['hidden_activation']!r} "
            f"and hidden_act {hub.values['hidden_act']!r}"
        )
    return newer if hub.values.get("hidden_activation") else older


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    return {
        **unparse_model(config, "gemma", _CLASSES),
        "hidden_act": hub_activation(block.feed_forward.activation),
        **unparse_rotary(block.attention.positions, block.attention.head_dim),
    }


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    values["attention_bias"] = "blk.0.attn_q.bias" in header.tensors


GGUF = GgufDialect(architecture="gemma", model_type="gemma", keys=GGUF_KEYS, rules=gguf_rules, read=_read_gguf)

FAMILY = Family(name="Gemma", model_types=("gemma",), parse=parse, unparse=unparse, rules=scaled_rules, gguf=GGUF)
