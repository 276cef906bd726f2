"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): the LLaMA shape with RMSNorm over each query and key head."""

from __future__ import annotations

from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.families.qwen2 import parse_windows, unparse_windows
from mlxlm.models.family import Family
from mlxlm.models.gated_decoders import GGUF_KEYS, decoder_rules, parse_decoder, unparse_decoder
from mlxlm.models.gguf_dialect import GgufDialect
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    bias = hub.take("attention_bias", default=False)
    windows = parse_windows(hub)
    return parse_decoder(
        hub, name="Qwen3", bias=bias, output_bias=bias, head_norm=True, head_dim=128, windows=windows, spans=True
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    keys = unparse_decoder(config, model_type="qwen3", name="Qwen3")
    return {**keys, **unparse_windows(config), "attention_bias": config.stack.layers[0].attention.bias}


GGUF = GgufDialect(architecture="qwen3", model_type="qwen3", keys=GGUF_KEYS, rules=gguf_rules)

FAMILY = Family(name="Qwen3", model_types=("qwen3",), parse=parse, unparse=unparse, rules=decoder_rules, gguf=GGUF)
