"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): pre-LayerNorm encoder without biases, GeGLU, rotary positions, and
layers that see everything in turn with layers that see a window on both sides, each kind with a rotary base of its own.
"""

from __future__ import annotations

from typing import Any

from mlxlm.errors import ConfigError
from mlxlm.layers import EmbeddingsSpec, LayerNormSpec
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.family import Family, Layout
from mlxlm.models.gated_encoders import body_rules, parse_layers
from mlxlm.models.head_config import architecture, parse_task_head, unparse_labels
from mlxlm.models.heads import HeadSpec, LanguageModelHeadSpec, TransformSpec
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.layer_types import FULL, WINDOW, unparse_layer_types, windows
from mlxlm.models.rotary_config import unparse_layered_rotary
from mlxlm.models.weights import Rule, rename, tied_copy

_BASES = {FULL: 160000.0, WINDOW: 10000.0}
_OLDER = {FULL: "global_rope_theta", WINDOW: "local_rope_theta"}
_TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    supported = tuple(f"ModernBert{task}" for task in _TASKS)
    if hub.architecture not in ("", *supported):
        raise hub.unsupported_head(*supported)
    dim = hub.take("hidden_size", default=768)
    max_length = hub.take("max_position_embeddings", default=8192)
    norm = LayerNormSpec(dim=dim, eps=hub.take("norm_eps", default=1e-5), bias=hub.take("norm_bias", default=False))
    num_layers = hub.take("num_hidden_layers", default=22)
    every = hub.take("global_attn_every_n_layers", default=3)
    layers = parse_layers(
        hub,
        norm,
        kinds=[WINDOW if index % every else FULL for index in range(num_layers)],
        bases=_BASES,
        older=_OLDER,
        heads=12,
        hidden_dim=1152,
        window=128,
    )
    hub.note("cls_token_id", "initializer_cutoff_factor", "layer_norm_eps", "position_embedding_type")
    hub.note("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad")
    hub.note("sparse_prediction", "sparse_pred_ignore_index")  # which positions the loss is computed at
    vocab_size = hub.take("vocab_size", default=50368)
    return TransformerConfig(
        embeddings=EmbeddingsSpec(
            vocab_size=vocab_size, dim=dim, norm=norm, dropout=hub.take("embedding_dropout", default=0.0)
        ),
        encoder=StackSpec(layers=layers, norm=norm),
        head=_head(hub, dim, vocab_size, norm),
        max_length=max_length,
    )


def _head(hub: HubConfig, dim: int, vocab_size: int, norm: LayerNormSpec) -> HeadSpec | None:
    transform = TransformSpec(
        dim=dim,
        activation=hub.activation("classifier_activation", default="gelu"),
        norm=norm,
        bias=hub.take("classifier_bias", default=False),
    )
    pooling = {"cls": "first", "mean": "mean"}.get(hub.take("classifier_pooling", default="cls"))
    if pooling is None:
        raise ConfigError(f"config.json: classifier_pooling is cls or mean, not {hub.values['classifier_pooling']!r}")
    dropout = hub.take("classifier_dropout", default=0.0)
    bias, tied = hub.take("decoder_bias", default=True), hub.take("tie_word_embeddings", default=True)
    if hub.architecture == "ModernBertModel":
        return None
    return parse_task_head(
        hub,
        "ModernBert",
        dim=dim,
        pooling=pooling,  # type: ignore[arg-type]
        dropout=dropout,
        transform=transform,
        token_transform=transform,
    ) or LanguageModelHeadSpec(dim=dim, vocab_size=vocab_size, tied=tied, bias=bias, transform=transform)


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    layers, norm, head = config.stack.layers, config.stack.norm, config.head
    attention, feed_forward = layers[0].attention, layers[0].feed_forward
    kinds = unparse_layer_types(config)
    rotary = {kind: layer.attention.positions for kind, layer in zip(kinds, layers, strict=True)}
    window = next((window for window in windows(config) if window is not None), 65)
    keys = {
        "architectures": [architecture(config, "ModernBert", "ForMaskedLM")],
        "model_type": "modernbert",
        "vocab_size": config.embeddings.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": feed_forward.hidden_dim,
        "num_hidden_layers": len(layers),
        "num_attention_heads": attention.num_heads,
        "hidden_activation": hub_activation(feed_forward.activation),
        "max_position_embeddings": config.max_length,
        "norm_eps": norm.eps,
        "norm_bias": norm.bias,
        "attention_bias": attention.bias,
        "attention_dropout": attention.dropout,
        "embedding_dropout": config.embeddings.dropout,
        "mlp_bias": feed_forward.bias,
        "mlp_dropout": feed_forward.dropout,
        "local_attention": 2 * (window - 1),
        "layer_types": kinds,
        **unparse_layered_rotary(rotary, attention.head_dim, older=_OLDER, scaled=FULL),
        "rope_scaling": None,
        "tie_word_embeddings": not config.untied,
        **unparse_labels(config),
    }
    if head is not None:
        transform = head.transform
        keys["classifier_activation"] = hub_activation(transform.activation)  # type: ignore[union-attr]
        keys["classifier_bias"] = transform.bias  # type: ignore[union-attr]
    if isinstance(head, LanguageModelHeadSpec):
        keys["decoder_bias"] = head.bias
    elif head is not None:
        keys["classifier_dropout"] = head.dropout
        keys["classifier_pooling"] = "mean" if getattr(head, "pooling", "") == "mean" else "cls"
    return keys


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names."""
    if config.predicts_words:
        tied_bias = "head.output.bias" if config.untied else "head.bias"
        heads: tuple[Rule, ...] = (
            rename("decoder.bias", tied_bias),
            rename("decoder.weight", "head.output.weight")
            if config.untied
            else tied_copy("decoder.weight", "embeddings.token.weight"),
        )
    else:
        heads = (rename("classifier.{p}", "head.output.{p}"),)
    return (
        *body_rules(config),
        rename("head.dense.{p}", "head.transform.linear.{p}"),
        rename("head.norm.{p}", "head.transform.norm.{p}"),
        *heads,
    )


FAMILY = Family(name="ModernBERT", model_types=("modernbert",), parse=parse, unparse=unparse, rules=rules)
