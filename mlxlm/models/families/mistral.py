"""Mistral (Jiang et al. 2023, arXiv:2310.06825): the LLaMA shape with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.families import llama
from mlxlm.models.family import Family
from mlxlm.models.gated_decoders import decoder_rules, parse_decoder, unparse_decoder
from mlxlm.models.gguf_dialect import GgufHeader
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


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    values["sliding_window"] = None  # the format has no key for it


# Files say that they are of the family whose shape this is; a model with a window can't be described.
GGUF = replace(llama.GGUF, model_type="mistral", read=_read_gguf)

FAMILY = Family(name="Mistral", model_types=("mistral",), parse=parse, unparse=unparse, rules=decoder_rules, gguf=GGUF)
