"""Classification heads in a config.json: what the `architectures` entry asks for, and the names of the labels."""

from __future__ import annotations

from typing import Any, Literal

from mlxlm.errors import ConfigError
from mlxlm.models.config import TransformerConfig
from mlxlm.models.heads import (
    HeadSpec,
    LanguageModelHeadSpec,
    SequenceHeadSpec,
    SpanHeadSpec,
    TokenHeadSpec,
    TransformSpec,
)
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule, rename, tied_copy

# What follows the family's name in a transformers class, by the kind of head.
TASKS: dict[type[TokenHeadSpec], str] = {
    SequenceHeadSpec: "ForSequenceClassification",
    TokenHeadSpec: "ForTokenClassification",
    SpanHeadSpec: "ForQuestionAnswering",
}


def parse_labels(hub: HubConfig) -> tuple[str, ...]:
    """Names of the labels in order; as in transformers two of them, LABEL_0 and LABEL_1, where the config is silent."""
    names = hub.take("id2label", default=None)
    if names is None:
        return tuple(f"LABEL_{number}" for number in range(hub.take("num_labels", "_num_labels", default=2)))
    numbers = sorted(int(number) for number in names)
    if numbers != list(range(len(numbers))):
        raise ConfigError(f"config.json: id2label has the numbers {numbers}, expected 0 to {len(numbers) - 1}")
    return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))


def parse_task_head(
    hub: HubConfig,
    name: str,
    *,
    dim: int,
    pooling: Literal["first", "last", "mean"],
    dropout: float = 0.0,
    bias: bool = True,
    transform: TransformSpec | None = None,
    token_transform: TransformSpec | None = None,
) -> TokenHeadSpec | None:
    """The classification head that the config asks for, or None.

    name: prefix of the transformers classes.  pooling, transform: of a head over sequences.  bias: of its projection.
    token_transform: of a head over tokens or spans.  dropout: of all of them.
    """
    task = hub.architecture.removeprefix(name)
    if task == TASKS[SequenceHeadSpec]:
        return SequenceHeadSpec(
            dim=dim, labels=parse_labels(hub), pooling=pooling, transform=transform, bias=bias, dropout=dropout
        )
    if task == TASKS[TokenHeadSpec]:
        return TokenHeadSpec(dim=dim, labels=parse_labels(hub), transform=token_transform, dropout=dropout)
    if task == TASKS[SpanHeadSpec]:
        return SpanHeadSpec(dim=dim, transform=token_transform, dropout=dropout)
    return None


def architecture(config: TransformerConfig, name: str, language_model: str) -> str:
    """The transformers class of a model.  name: of the family.  language_model: what follows it, "ForCausalLM" say."""
    if config.head is None:
        return f"{name}Model"
    return name + (language_model if config.predicts_words else TASKS[type(config.head)])  # type: ignore[index]


def unparse_labels(config: TransformerConfig) -> dict[str, Any]:
    """The config.json keys that name the labels; none for models without any."""
    head = config.head
    if not isinstance(head, TokenHeadSpec) or isinstance(head, SpanHeadSpec):
        return {}
    return {
        "id2label": {str(number): label for number, label in enumerate(head.labels)},
        "label2id": {label: number for number, label in enumerate(head.labels)},
    }


def parse_decoder_head(
    hub: HubConfig,
    name: str,
    *,
    dim: int,
    language_model: LanguageModelHeadSpec,
    suffix: str = "ForCausalLM",
    spans: bool = False,
) -> HeadSpec | None:
    """The head of a decoder: over the vocabulary, over sequences by their last token, over tokens or spans, or none.

    name: prefix of the transformers classes.  suffix: of the one with a language-model head.  spans: whether there is
    one with a head over spans.
    Raises UnsupportedModelError for any other architecture.
    """
    supported = (
        f"{name}{suffix}",
        f"{name}Model",
        *(name + task for kind, task in TASKS.items() if spans or kind is not SpanHeadSpec),
    )
    if hub.architecture in ("", supported[0]):
        return language_model
    if hub.architecture == supported[1]:
        return None
    if hub.architecture not in supported:
        raise hub.unsupported_head(*supported)
    of_tokens = hub.architecture == supported[3]
    dropout = hub.take("classifier_dropout", "hidden_dropout", default=0.1) if of_tokens else 0.0
    return parse_task_head(hub, name, dim=dim, pooling="last", bias=False, dropout=dropout)


def decoder_head_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    """Weight names of what `parse_decoder_head` gives, as most decoders have them."""
    if isinstance(config.head, SpanHeadSpec):
        return (rename("qa_outputs.{p}", "head.output.{p}"),)
    if isinstance(config.head, TokenHeadSpec):
        return (rename("score.{p}", "head.output.{p}"),)
    return (
        rename("lm_head.{p}", "head.output.{p}") if config.untied else tied_copy("lm_head.{p}", "embeddings.token.{p}"),
    )
