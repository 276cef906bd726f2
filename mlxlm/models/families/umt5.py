"""umT5 (Chung et al. 2023, arXiv:2304.09151): the shape of mT5 with a table of relative positions in every layer.

Logits are scaled where tie_word_embeddings is true, as transformers writes it. The published checkpoints say false and
were trained without scaling; transformers 5 scales them nevertheless, which changes probabilities but not their order.
"""

from __future__ import annotations

from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.families.t5 import parse_seq2seq, seq2seq_rules, unparse_seq2seq
from mlxlm.models.family import Family
from mlxlm.models.hub_config import HubConfig


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    return parse_seq2seq(hub, name="UMT5", scaled=hub.take("tie_word_embeddings", default=True), shared=False)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    keys = unparse_seq2seq(config, model_type="umt5", name="UMT5")
    return {**keys, "tie_word_embeddings": not config.predicts_words or config.head.scale != 1.0}


FAMILY = Family(name="umT5", model_types=("umt5",), parse=parse, unparse=unparse, rules=seq2seq_rules)
