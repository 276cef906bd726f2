"""LLaMA 1 to 3 (Touvron et al. 2023, arXiv:2302.13971): pre-RMSNorm, rotary positions, grouped heads, SwiGLU."""

from __future__ import annotations

from functools import partial
from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.family import Family
from mlxlm.models.gated_decoders import GGUF_KEYS, decoder_rules, parse_decoder, unparse_decoder
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    bias = hub.take("attention_bias", default=False)
    mlp_bias = hub.take("mlp_bias", default=False)
    return parse_decoder(hub, name="Llama", bias=bias, output_bias=bias, mlp_bias=mlp_bias, spans=True)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    keys = unparse_decoder(config, model_type="llama", name="Llama")
    return {**keys, "attention_bias": block.attention.bias, "mlp_bias": block.feed_forward.bias}


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    values["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    values["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    header.expect("expert_count", 0)


GGUF = GgufDialect(
    architecture="llama",
    model_type="llama",
    keys=GGUF_KEYS,
    rules=partial(gguf_rules, paired=True),
    read=_read_gguf,
)

FAMILY = Family(name="LLaMA", model_types=("llama",), parse=parse, unparse=unparse, rules=decoder_rules, gguf=GGUF)
