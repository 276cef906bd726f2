"""What a family of models is: how its config.json and its weight names translate, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mlxlm.errors import ConfigError
from mlxlm.models.config import TransformerConfig
from mlxlm.models.gguf_dialect import GgufDialect
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule

# "hub": as transformers saves. "mlx": as mlx-lm saves, where a few families keep weights in another orientation.
Layout = Literal["hub", "mlx"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family file in `models/families`.

    name: for people.  model_types: values of config.json's `model_type`.  parse: config.json to configuration; it
    accounts for every key.  unparse: the way back.  rules: weight names on disk.  gguf: where GGUF files of it exist.
    mlx_keys: of config.json, without effect, which mlx-lm can't do without.
    reference: what computes the logits that the tests compare with, default transformers.
    """

    name: str
    model_types: tuple[str, ...]
    parse: Callable[[HubConfig], TransformerConfig]
    unparse: Callable[[TransformerConfig], dict[str, Any]]
    rules: Callable[[TransformerConfig, Layout], tuple[Rule, ...]]
    gguf: GgufDialect | None = None
    reference: str = "transformers"
    mlx_keys: tuple[str, ...] = ()

    def read_config(self, values: dict[str, Any], weights: frozenset[str] | None = None) -> TransformerConfig:
        """The configuration that a config.json describes. Raises ConfigError for keys nobody accounts for.

        weights: names of the checkpoint's tensors, when they are at hand.
        """
        hub = HubConfig(values, weights)
        try:
            config = self.parse(hub)
        except (TypeError, AttributeError, KeyError, ZeroDivisionError, OverflowError) as error:
            raise ConfigError(
                f"config.json of a {hub.model_type}: a value is of the wrong type or size ({error})"
            ) from error
        hub.finish()
        return config
