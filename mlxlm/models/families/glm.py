"""GLM-4 in transformers' layout (GLM Team 2024, arXiv:2406.12793): the LLaMA shape with interleaved rotary positions on
half of each head, biases on query, key and value, and a fused gate and up projection.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import GATE_UP, prefixes
from mlxlm.models.family import Family, Layout
from mlxlm.models.gated_decoders import GGUF_KEYS, decoder_rules, parse_decoder, unparse_decoder
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule, split, under


def parse_half_rotary(hub: HubConfig, name: str) -> TransformerConfig:
    """The decoder of this shape.  name: prefix of the transformers classes."""
    return parse_decoder(
        hub,
        name=name,
        bias=hub.take("attention_bias", default=True),
        head_dim=128,
        num_kv_heads=2,
        eps=0.00000015625,
        rotary={"partial": 0.5, "layout": "interleaved"},
    )


def unparse_half_rotary(config: TransformerConfig, model_type: str, name: str) -> dict[str, Any]:
    """The config.json keys of this shape."""
    attention = config.stack.layers[0].attention
    keys = unparse_decoder(config, model_type=model_type, name=name)
    share = attention.positions.dim / attention.head_dim
    return {**keys, "attention_bias": attention.bias, "partial_rotary_factor": share}


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    return parse_half_rotary(hub, "Glm")


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    return unparse_half_rotary(config, "glm", "Glm")


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names: gate and up are one tensor."""
    hidden_dim = config.stack.layers[0].feed_forward.hidden_dim
    fused = under(prefixes(config, "model."), "layers.{n}.mlp.gate_up_proj.{p}")
    return (split(fused, GATE_UP, (hidden_dim, hidden_dim)), *decoder_rules(config, layout))


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    values["attention_bias"] = "blk.0.attn_q.bias" in header.tensors


# Files say the architecture of the same model in the layout of its remote code; they are read as that.
GGUF = GgufDialect(
    architecture="chatglm",
    model_type="glm",
    keys=GGUF_KEYS,
    rules=partial(gguf_rules, gate_up=True),
    read=_read_gguf,
)

FAMILY = Family(name="GLM-4", model_types=("glm",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
