"""BERT (Devlin et al. 2018, arXiv:1810.04805): post-LayerNorm encoder, learned positions, token types."""

from __future__ import annotations

from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.encoders import encoder_rules, masked_output_rules, norm_rules, parse_encoder, unparse_encoder
from mlxlm.models.family import Family, Layout
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.heads import (
    SequenceHeadSpec,
    SpanHeadSpec,
)
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule, rename, under

_TASKS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    supported = ("BertModel", "BertForPreTraining", *(f"Bert{task}" for task in _TASKS))
    if hub.architecture not in ("", *supported):
        raise hub.unsupported_head(*supported)
    return parse_encoder(hub, name="Bert", masked="cls.predictions.transform.dense.weight", vocab_size=30522)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    keys = unparse_encoder(config, model_type="bert", name="Bert")
    if config.predicts_words and config.pooler is not None and config.pooler.next_sentence:
        keys["architectures"] = ["BertForPreTraining"]
    return keys


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names."""
    prefixes = ("bert.", "") if config.head else ("", "bert.")
    of_sequences = isinstance(config.head, SequenceHeadSpec)
    heads: tuple[Rule, ...] = (
        rename(
            under(prefixes, "pooler.dense.{p}"), "head.transform.linear.{p}" if of_sequences else "pooler.linear.{p}"
        ),
        rename("cls.seq_relationship.{p}", "pooler.next_sentence.{p}"),
    )
    if config.predicts_words:
        heads += (
            rename("cls.predictions.transform.dense.{p}", "head.transform.linear.{p}"),
            *norm_rules(("cls.predictions.transform.",), "LayerNorm", "head.transform.norm"),
            *masked_output_rules(config, "cls.predictions."),
        )
    elif config.head is not None:
        name = "qa_outputs" if isinstance(config.head, SpanHeadSpec) else "classifier"
        heads += (rename(f"{name}.{{p}}", "head.output.{p}"),)
    return (*encoder_rules(config, "bert"), *heads)


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    header.expect("attention.causal", False)
    values["architectures"] = ["BertModel"]
    values["type_vocab_size"] = header.tensors.shapes["token_types.weight"][0]


GGUF = GgufDialect(
    architecture="bert",
    model_type="bert",
    keys={
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.layer_norm_epsilon": "layer_norm_eps",
    },
    rules=gguf_rules,
    rotary=False,
    read=_read_gguf,
    write=lambda config: {"attention.causal": False},
    weights=frozenset(),  # neither heads nor a pooler
)

FAMILY = Family(name="BERT", model_types=("bert",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
