"""T5, T5 v1.1 and Flan-T5 (Raffel et al. 2019, arXiv:1910.10683): encoder and decoder, pre-RMSNorm, no biases, unscaled
attention, relative position buckets that all layers of a stack share.
"""

from __future__ import annotations

from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.encoder_decoders import parse_seq2seq, seq2seq_rules, unparse_seq2seq
from mlxlm.models.family import Family
from mlxlm.models.hub_config import HubConfig


def logits_scaled(hub: HubConfig) -> bool:
    """Whether logits are multiplied by dim ** -0.5: so unless the config says that embeddings are not tied.

    transformers 5 ties them always and keeps what a checkpoint said of it under the other key.
    """
    return hub.take("scale_decoder_outputs", default=hub.take("tie_word_embeddings", default=True))


def unparse_scaled(config: TransformerConfig) -> dict[str, bool]:
    """The two keys that `logits_scaled` reads. Older readers take the scale from tie_word_embeddings."""
    scaled = not config.predicts_words or config.head.scale != 1.0
    return {"scale_decoder_outputs": scaled, "tie_word_embeddings": scaled}


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    return parse_seq2seq(
        hub,
        name="T5",
        scaled=logits_scaled(hub),
        vocab_size=32128,
        hidden_dim=2048,
        num_layers=6,
        num_heads=8,
        feed_forward="relu",
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    return {**unparse_seq2seq(config, model_type="t5", name="T5"), **unparse_scaled(config)}


FAMILY = Family(name="T5", model_types=("t5",), parse=parse, unparse=unparse, rules=seq2seq_rules)
