"""Gemma 3, text only (Gemma Team 2025, arXiv:2503.19786): Gemma 2 with query and key norms instead of soft-caps, five
layers with a window to one without, and rotary positions of another base in each kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxlm.layers import RMSNormSpec
from mlxlm.models.config import TransformerConfig
from mlxlm.models.families.gemma2 import read_query_scalar
from mlxlm.models.family import Family
from mlxlm.models.gated_decoders import GGUF_KEYS
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.rotary_config import parse_layered_rotary, unparse_layered_rotary
from mlxlm.models.scaled_decoders import (
    parse_block,
    parse_model,
    parse_windows,
    query_scalar,
    scaled_rules,
    unparse_model,
    unparse_windows,
)

_CLASSES = ("Gemma3TextModel", "Gemma3ForCausalLM")
_BASES = {"full_attention": 1e6, "sliding_attention": 1e4}
_OLDER = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    activation = hub.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    block = parse_block(hub, activation, num_kv_heads=4, sandwich=True)
    head_dim = block.attention.head_dim
    across_head = RMSNormSpec(dim=head_dim, eps=block.attention_residual.norm_in.eps, offset=1.0)
    attention = replace(
        block.attention,
        query_norm=across_head,
        key_norm=across_head,
        scale=hub.take("query_pre_attn_scalar", default=256) ** -0.5,
    )
    hub.expect("attn_logit_softcapping")  # no implementation applies it, and no release sets it
    windows = parse_windows(hub, pattern=hub.take("sliding_window_pattern", default=6), default=4096)
    hub.note("_sliding_window_pattern")  # layer_types is written beside it
    rotary = parse_layered_rotary(hub, head_dim, _BASES, older=_OLDER, scaled="full_attention")
    positions = tuple(rotary["full_attention" if window is None else "sliding_attention"] for window in windows)
    return parse_model(hub, _CLASSES, replace(block, attention=attention), windows, positions)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    layers = config.stack.layers
    attention = layers[0].attention
    rotary = {
        "full_attention" if layer.attention.window is None else "sliding_attention": layer.attention.positions
        for layer in reversed(layers)
    }
    return {
        **unparse_model(config, "gemma3_text", _CLASSES),
        "hidden_activation": hub_activation(layers[0].feed_forward.activation),
        "query_pre_attn_scalar": query_scalar(attention),
        **({"final_logit_softcapping": config.head.softcap} if config.predicts_words else {}),
        **unparse_windows(config),
        **unparse_layered_rotary(rotary, attention.head_dim, older=_OLDER, scaled="full_attention"),
    }


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    read_query_scalar(header, values, 62)
    pattern = header.left.pop("attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):
        values["sliding_window_pattern"] = pattern
    else:  # for each layer, whether it has a window
        values["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    values["rope_local_base_freq"] = header.take("rope.freq_base_swa", 10000.0)


def _write_gguf(config: TransformerConfig) -> dict[str, Any]:
    """The pattern as its period: how many layers in a row end with one that has no window."""
    windows = [layer.attention.window for layer in config.stack.layers]
    period = next((index + 1 for index, window in enumerate(windows) if window is None), 6)
    local = next((one.attention.positions for one in config.stack.layers if one.attention.window is not None), None)
    return {
        **({} if period == 6 else {"attention.sliding_window_pattern": period}),
        **({} if local is None else {"rope.freq_base_swa": local.base}),
    }


GGUF = GgufDialect(
    architecture="gemma3",
    model_type="gemma3_text",
    keys={
        **GGUF_KEYS,
        "attention.sliding_window": "sliding_window",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    rules=gguf_rules,
    read=_read_gguf,
    write=_write_gguf,
)

FAMILY = Family(
    name="Gemma 3", model_types=("gemma3_text",), parse=parse, unparse=unparse, rules=scaled_rules, gguf=GGUF
)
