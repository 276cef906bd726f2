"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): the LLaMA shape with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from mlxlm.models import layer_types
from mlxlm.models.config import TransformerConfig
from mlxlm.models.family import Family
from mlxlm.models.gated_decoders import GGUF_KEYS, decoder_rules, parse_decoder, unparse_decoder
from mlxlm.models.gguf_dialect import GgufDialect
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.layer_types import FULL, WINDOW


def parse_windows(hub: HubConfig) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types`, or of the layers from `max_window_layers` on."""
    num_layers = hub.take("num_hidden_layers")
    window = hub.take("sliding_window", default=4096)  # stays in the config when it is not used
    window = window if hub.take("use_sliding_window", default=False) else None
    full_layers = hub.take("max_window_layers", default=28)
    kinds = [FULL if window is None or index < full_layers else WINDOW for index in range(num_layers)]
    return layer_types.parse_windows(hub, kinds, window)


def unparse_windows(config: TransformerConfig) -> dict[str, Any]:
    """The config.json keys that say which layers have a window."""
    windows = layer_types.windows(config)
    window = next((window for window in windows if window is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next((i for i, w in enumerate(windows) if w is not None), len(windows)),
        "layer_types": layer_types.unparse_layer_types(config),
    }


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    return parse_decoder(hub, name="Qwen2", bias=True, windows=parse_windows(hub), spans=True)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    return {**unparse_decoder(config, model_type="qwen2", name="Qwen2"), **unparse_windows(config)}


GGUF = GgufDialect(architecture="qwen2", model_type="qwen2", keys=GGUF_KEYS, rules=gguf_rules)

FAMILY = Family(name="Qwen2", model_types=("qwen2",), parse=parse, unparse=unparse, rules=decoder_rules, gguf=GGUF)
