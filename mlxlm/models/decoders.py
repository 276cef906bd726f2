"""What the files of decoder-only families share: the outer parts of their configuration and of their weight rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlxlm.layers import BlockSpec, EmbeddingsSpec, NormSpec, ParallelBlockSpec
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.head_config import architecture, decoder_head_rules, parse_decoder_head, unparse_labels
from mlxlm.models.heads import LanguageModelHeadSpec, TokenHeadSpec
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule, rename, under


def assemble(
    hub: HubConfig,
    *,
    classes: tuple[str, str],
    embeddings: EmbeddingsSpec,
    layers: Iterable[BlockSpec | ParallelBlockSpec],
    norm: NormSpec,
    tied: bool,
    max_length: int | None,
    spans: bool = False,
    **head: Any,
) -> TransformerConfig:
    """A decoder with the head that `architectures` asks for: over the vocabulary, over sequences or tokens, or none.

    classes: of transformers, without a head and with one over the vocabulary, which a config that names none has.
    norm: after the last layer.  tied: what an absent `tie_word_embeddings` means.  spans: whether
    the family has a head over spans.  head: more arguments of
    `LanguageModelHeadSpec`.  Raises UnsupportedModelError for other classes.
    """
    bare, causal = classes
    dim, vocab_size = embeddings.dim, embeddings.vocab_size
    tied = hub.take("tie_word_embeddings", default=tied)
    language_model = LanguageModelHeadSpec(dim=dim, vocab_size=vocab_size, tied=tied, **head)
    causal_or_none = hub.architecture in ("", causal)
    return TransformerConfig(
        embeddings=embeddings,
        decoder=StackSpec(layers=tuple(layers), norm=norm),
        head=language_model
        if causal_or_none
        else parse_decoder_head(hub, bare.removesuffix("Model"), dim=dim, language_model=language_model, spans=spans),
        max_length=max_length,
    )


def outer_keys(config: TransformerConfig, model_type: str, classes: tuple[str, str]) -> dict[str, Any]:
    """The config.json keys that `assemble` reads, the way back."""
    bare, causal = classes
    keys = {"model_type": model_type, "vocab_size": config.embeddings.vocab_size}
    if isinstance(config.head, LanguageModelHeadSpec):
        return {"architectures": [causal], **keys, "tie_word_embeddings": config.head.tied}
    keys["architectures"] = [architecture(config, bare.removesuffix("Model"), "")]
    if type(config.head) is TokenHeadSpec:
        keys["classifier_dropout"] = config.head.dropout
    return keys | unparse_labels(config)


def prefixes(config: TransformerConfig, prefix: str) -> tuple[str, str]:
    """Where the body's weights stand on disk, the usual place first: a model without a head has them at the top."""
    return ("", prefix) if config.head is None else (prefix, "")


def layer_rules(where: tuple[str, ...], layer: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Renames in every layer.

    where: prefixes of the body.  layer: of a layer on disk, such as "layers.{n}.".  names: what follows on disk -> what
    follows `decoder.layers.{n}.` inside, both without the parameter's kind.
    """
    return tuple(
        rename(under(where, f"{layer}{hub}.{{p}}"), f"decoder.layers.{{n}}.{ours}.{{p}}") for hub, ours in names.items()
    )


def outer_rules(
    config: TransformerConfig, where: tuple[str, ...], *, token: str, norm: str, tokens_head: str = "score"
) -> tuple[Rule, ...]:
    """Renames of the token table, the last norm and the head; copies of a tied table are dropped.

    token, norm: modules under the prefixes `where`.  tokens_head: module of the head over tokens.
    """
    bias = isinstance(config.head, LanguageModelHeadSpec) and config.head.tied and config.head.bias
    return (
        rename(under(where, token + ".{p}"), "embeddings.token.{p}"),
        rename(under(where, norm + ".{p}"), "decoder.norm.{p}"),
        *((rename("lm_head.bias", "head.bias"),) if bias else ()),
        *((rename(tokens_head + ".{p}", "head.output.{p}"),) if type(config.head) is TokenHeadSpec else ()),
        *decoder_head_rules(config),
    )


def canonical(*names: str) -> tuple[str, ...]:
    """Canonical names of modules in a layer, such as "attention.query", as patterns for the parts of a fused tensor."""
    return tuple(f"decoder.layers.{{n}}.{name}.{{p}}" for name in names)


QKV = canonical("attention.query", "attention.key", "attention.value")
GATE_UP = canonical("feed_forward.gate", "feed_forward.up")
