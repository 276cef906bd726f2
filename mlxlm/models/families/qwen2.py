"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): the LLaMA shape with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from mlxlm.errors import ConfigError
from mlxlm.models.config import TransformerConfig
from mlxlm.models.family import Family
from mlxlm.models.gated_decoders import GGUF_KEYS, decoder_rules, parse_decoder, unparse_decoder
from mlxlm.models.gguf_dialect import GgufDialect
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig


def parse_windows(hub: HubConfig) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types`, or of the layers from `max_window_layers` on."""
    num_layers = hub.take("num_hidden_layers")
    window = hub.take("sliding_window", default=4096)  # stays in the config when it is not used
    window = window if hub.take("use_sliding_window", default=False) else None
    full_layers = hub.take("max_window_layers", default=28)
    kinds = hub.take("layer_types", default=None)
    if kinds is None:
        return tuple(window if index >= full_layers else None for index in range(num_layers))
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(
            f"config.json: unknown layer_types {sorted(unknown)}, expected full_attention or sliding_attention"
        )
    if "sliding_attention" in kinds and window is None:
        raise ConfigError("config.json: layer_types has sliding_attention, but there is no sliding_window in use")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def unparse_windows(config: TransformerConfig) -> dict[str, Any]:
    """The config.json keys that say which layers have a window."""
    windows = [layer.attention.window for layer in config.stack.layers]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    window = next((window for window in windows if window is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next((i for i, w in enumerate(windows) if w is not None), len(windows)),
        "layer_types": kinds,
    }


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    return parse_decoder(hub, name="Qwen2", bias=True, windows=parse_windows(hub), spans=True)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    return {**unparse_decoder(config, model_type="qwen2", name="Qwen2"), **unparse_windows(config)}


GGUF = GgufDialect(architecture="qwen2", model_type="qwen2", keys=GGUF_KEYS, rules=gguf_rules)

FAMILY = Family(name="Qwen2", model_types=("qwen2",), parse=parse, unparse=unparse, rules=decoder_rules, gguf=GGUF)
