"""`layer_types` of a config.json: which layers see everything and which a window only, in both directions."""

from __future__ import annotations

from collections.abc import Sequence

from mlxlm.errors import ConfigError
from mlxlm.models.config import TransformerConfig
from mlxlm.models.hub_config import HubConfig

FULL, WINDOW = "full_attention", "sliding_attention"


def parse_layer_types(hub: HubConfig, default: Sequence[str]) -> tuple[str, ...]:
    """FULL or WINDOW for each layer.

    default: what holds where the config doesn't say, one entry a layer. Raises ConfigError for another number of
    entries and for other kinds.
    """
    kinds = hub.take("layer_types", default=default)
    if len(kinds) != len(default) or set(kinds) - {FULL, WINDOW}:
        raise ConfigError(f"config.json: layer_types is {kinds}, expected {len(default)} of {FULL!r} or {WINDOW!r}")
    return tuple(kinds)


def parse_windows(hub: HubConfig, default: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer, None for those that see everything.

    default: as in `parse_layer_types`.  window: of the layers that have one; ConfigError when it is None and
    `layer_types` asks for it.
    """
    kinds = parse_layer_types(hub, default)
    if WINDOW in kinds and window is None:
        raise ConfigError(f"config.json: layer_types has {WINDOW}, but there is no sliding_window in use")
    return tuple(window if kind == WINDOW else None for kind in kinds)


def windows(config: TransformerConfig) -> list[int | None]:
    """The window of each layer of the stack."""
    return [layer.attention.window for layer in config.stack.layers]


def unparse_layer_types(config: TransformerConfig) -> list[str]:
    """The config's entry, the way back."""
    return [FULL if window is None else WINDOW for window in windows(config)]
