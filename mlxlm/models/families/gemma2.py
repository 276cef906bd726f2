"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): Gemma with norms around each part, soft-capped scores and logits, and
a window in every other layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.family import Family
from mlxlm.models.gated_decoders import GGUF_KEYS
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.rotary_config import parse_rotary, unparse_rotary
from mlxlm.models.scaled_decoders import (
    parse_block,
    parse_model,
    parse_windows,
    query_scalar,
    scaled_rules,
    unparse_model,
    unparse_windows,
)

_CLASSES = ("Gemma2Model", "Gemma2ForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    activation = hub.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    block = parse_block(hub, activation, num_kv_heads=4, sandwich=True)
    attention = replace(
        block.attention,
        scale=hub.take("query_pre_attn_scalar", default=256) ** -0.5,
        softcap=_softcap(hub, "attn_logit_softcapping", 50.0),
    )
    windows = parse_windows(hub, pattern=2, default=4096)
    positions = parse_rotary(hub, attention.head_dim)
    config = parse_model(hub, _CLASSES, replace(block, attention=attention), windows, (positions,) * len(windows))
    softcap = _softcap(hub, "final_logit_softcapping", 30.0)
    return replace(config, head=replace(config.head, softcap=softcap)) if config.predicts_words else config


def _softcap(hub: HubConfig, name: str, absent: float) -> float | None:
    # null switches it off, which is not the same as leaving the key away
    return hub.take(name, default=None) if name in hub.values else absent


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    return {
        **unparse_model(config, "gemma2", _CLASSES),
        "hidden_activation": hub_activation(block.feed_forward.activation),
        "query_pre_attn_scalar": query_scalar(block.attention),
        "attn_logit_softcapping": block.attention.softcap,
        **({"final_logit_softcapping": config.head.softcap} if config.predicts_words else {}),
        **unparse_windows(config),
        **unparse_rotary(block.attention.positions, block.attention.head_dim),
    }


def read_query_scalar(header: GgufHeader, values: dict[str, Any], largest: int) -> None:
    """GGUF files don't hold the scale of the scores: it follows from the head, but in the model of `largest` layers
    from the width that there is for each head.
    """
    width = values["hidden_size"] // values["num_attention_heads"]
    values["query_pre_attn_scalar"] = width if values["num_hidden_layers"] == largest else header.head_dim


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    read_query_scalar(header, values, 46)


GGUF = GgufDialect(
    architecture="gemma2",
    model_type="gemma2",
    keys={
        **GGUF_KEYS,
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    rules=gguf_rules,
    read=_read_gguf,
)

FAMILY = Family(name="Gemma 2", model_types=("gemma2",), parse=parse, unparse=unparse, rules=scaled_rules, gguf=GGUF)
