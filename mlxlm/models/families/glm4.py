"""GLM-4-0414 and later GLM-4 (Z.ai 2025; GLM Team 2024, arXiv:2406.12793): GLM-4 with a norm after each part as well
as before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import layer_rules, prefixes
from mlxlm.models.families import glm
from mlxlm.models.family import Family, Layout
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    config = glm.parse_half_rotary(hub, "Glm4")
    residual = replace(config.stack.layers[0].attention_residual, norm_out=config.stack.norm)
    layers = tuple(
        replace(layer, attention_residual=residual, feed_forward_residual=residual) for layer in config.stack.layers
    )
    return replace(config, decoder=replace(config.stack, layers=layers))


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    return glm.unparse_half_rotary(config, "glm4", "Glm4")


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names: those of the first GLM-4 and two more norms."""
    names = {
        "post_self_attn_layernorm": "attention_residual.norm_out",
        "post_mlp_layernorm": "feed_forward_residual.norm_out",
    }
    return (*layer_rules(prefixes(config, "model."), "layers.{n}.", names), *glm.rules(config, layout))


GGUF = replace(glm.GGUF, architecture="glm4", model_type="glm4")

FAMILY = Family(name="GLM-4-0414", model_types=("glm4",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
