"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): the BERT shape, whose positions begin behind the padding token's id."""

from __future__ import annotations

from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.encoders import encoder_rules, masked_output_rules, norm_rules, parse_encoder, unparse_encoder
from mlxlm.models.family import Family, Layout
from mlxlm.models.heads import SequenceHeadSpec, SpanHeadSpec
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule, rename, under

_TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    supported = tuple(f"Roberta{task}" for task in _TASKS)
    if hub.architecture not in ("", *supported):
        raise hub.unsupported_head(*supported)
    return parse_encoder(
        hub,
        name="Roberta",
        masked="lm_head.dense.weight",
        vocab_size=50265,
        first=hub.take("pad_token_id", default=1) + 1,
        activation="gelu",
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    keys = unparse_encoder(config, model_type="roberta", name="Roberta")
    return {**keys, "pad_token_id": config.embeddings.positions.first - 1}  # type: ignore[union-attr]


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names."""
    prefixes = ("roberta.", "") if config.head else ("", "roberta.")
    heads: tuple[Rule, ...] = (rename(under(prefixes, "pooler.dense.{p}"), "pooler.linear.{p}"),)
    if config.predicts_words:
        heads += (
            rename("lm_head.dense.{p}", "head.transform.linear.{p}"),
            *norm_rules(("lm_head.",), "layer_norm", "head.transform.norm"),
            *masked_output_rules(config, "lm_head."),
        )
    elif isinstance(config.head, SequenceHeadSpec):
        heads += (
            rename("classifier.dense.{p}", "head.transform.linear.{p}"),
            rename("classifier.out_proj.{p}", "head.output.{p}"),
        )
    elif config.head is not None:
        name = "qa_outputs" if isinstance(config.head, SpanHeadSpec) else "classifier"
        heads += (rename(f"{name}.{{p}}", "head.output.{p}"),)
    return (*encoder_rules(config, "roberta"), *heads)


FAMILY = Family(name="RoBERTa", model_types=("roberta",), parse=parse, unparse=unparse, rules=rules)
