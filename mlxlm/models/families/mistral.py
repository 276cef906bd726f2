"""Mistral (Jiang et al. 2023, arXiv:2310.06825): the LLaMA shape with a sliding window in every layer."""

from __future__ import annotations

from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.families.llama import decoder_rules, parse_decoder, unparse_decoder
from mlxlm.models.family import Family
from mlxlm.models.hub_config import HubConfig


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    # An absent key means the first release's window, null means none.
    window = hub.take("sliding_window", default=None) if "sliding_window" in hub.values else 4096
    windows = (window,) * hub.take("num_hidden_layers")
    return parse_decoder(hub, name="Mistral", num_kv_heads=8, windows=windows)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    keys = unparse_decoder(config, model_type="mistral", name="Mistral")
    return {**keys, "sliding_window": config.stack.layers[0].attention.window}


FAMILY = Family(name="Mistral", model_types=("mistral",), parse=parse, unparse=unparse, rules=decoder_rules)
