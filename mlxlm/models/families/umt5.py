"""umT5 (Chung et al. 2023, arXiv:2304.09151): the shape of mT5 with a table of relative positions in every layer.

Logits are scaled as in T5: unless the config says that embeddings are not tied, as the published checkpoints do.
(transformers 5 before 5.24 scaled those too, which changes probabilities but not their order.)
"""

from __future__ import annotations

from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.encoder_decoders import parse_seq2seq, seq2seq_rules, unparse_seq2seq
from mlxlm.models.families.t5 import logits_scaled, unparse_scaled
from mlxlm.models.family import Family
from mlxlm.models.hub_config import HubConfig


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    return parse_seq2seq(hub, name="UMT5", scaled=logits_scaled(hub), shared=False)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    return {**unparse_seq2seq(config, model_type="umt5", name="UMT5"), **unparse_scaled(config)}


FAMILY = Family(name="umT5", model_types=("umt5",), parse=parse, unparse=unparse, rules=seq2seq_rules)
