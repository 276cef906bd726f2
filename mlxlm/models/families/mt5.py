"""mT5 (Xue et al. 2020, arXiv:2010.11934): the shape of T5 v1.1, whose logits are never scaled, for 101 languages."""

from __future__ import annotations

from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.encoder_decoders import parse_seq2seq, seq2seq_rules, unparse_seq2seq
from mlxlm.models.family import Family
from mlxlm.models.hub_config import HubConfig


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    return parse_seq2seq(hub, name="MT5", scaled=False)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    keys = unparse_seq2seq(config, model_type="mt5", name="MT5")
    return {**keys, "tie_word_embeddings": not config.untied}


FAMILY = Family(name="mT5", model_types=("mt5",), parse=parse, unparse=unparse, rules=seq2seq_rules)
