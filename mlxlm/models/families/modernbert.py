"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): pre-LayerNorm encoder without biases, GeGLU, rotary positions, and
layers that see everything in turn with layers that see a window on both sides, each kind with a rotary base of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxlm.errors import ConfigError
from mlxlm.layers import (
    AttentionSpec,
    BlockSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    LayerNormSpec,
    NoNormSpec,
    ResidualSpec,
)
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.family import Family, Layout
from mlxlm.models.head_config import architecture, parse_task_head, unparse_labels
from mlxlm.models.heads import HeadSpec, LanguageModelHeadSpec, TransformSpec
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.rotary_config import parse_layered_rotary, unparse_layered_rotary
from mlxlm.models.weights import Rule, rename, split, tied_copy, under

_FULL, _WINDOW = "full_attention", "sliding_attention"
_BASES = {_FULL: 160000.0, _WINDOW: 10000.0}
_OLDER = {_FULL: "global_rope_theta", _WINDOW: "local_rope_theta"}
_TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    supported = tuple(f"ModernBert{task}" for task in _TASKS)
    if hub.architecture not in ("", *supported):
        raise hub.unsupported_head(*supported)
    dim, heads = hub.take("hidden_size", default=768), hub.take("num_attention_heads", default=12)
    max_length = hub.take("max_position_embeddings", default=8192)
    norm = LayerNormSpec(dim=dim, eps=hub.take("norm_eps", default=1e-5), bias=hub.take("norm_bias", default=False))
    bias, dropout = hub.take("attention_bias", default=False), hub.take("attention_dropout", default=0.0)
    attention = AttentionSpec(
        dim=dim,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim // heads,
        causal=False,
        bias=bias,
        output_bias=bias,
        dropout=dropout,
    )
    hub.expect("rope_scaling")  # the older dialect has none
    rotary = parse_layered_rotary(hub, dim // heads, _BASES, older=_OLDER, scaled=_FULL)
    # So many tokens in all, itself in the middle: half of them on each side.
    window = hub.take("local_attention", default=128) // 2 + 1
    kinds = {
        _FULL: replace(attention, positions=rotary[_FULL]),
        _WINDOW: replace(attention, positions=rotary[_WINDOW], window=window),
    }
    feed_forward = FeedForwardSpec(
        dim=dim,
        hidden_dim=hub.take("intermediate_size", default=1152),
        activation=hub.activation("hidden_activation", default="gelu"),
        gated=True,
        bias=hub.take("mlp_bias", default=False),
        dropout=hub.take("mlp_dropout", default=0.0),
    )
    layers = tuple(
        BlockSpec(
            attention=kinds[kind],
            # The embeddings are normed already, so the first layer has no norm here.
            attention_residual=ResidualSpec(norm_in=norm if index else NoNormSpec(), dropout=dropout),
            feed_forward=feed_forward,
            feed_forward_residual=ResidualSpec(norm_in=norm),
        )
        for index, kind in enumerate(_kinds(hub))
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


def _kinds(hub: HubConfig) -> tuple[str, ...]:
    """full_attention or sliding_attention for each layer."""
    num_layers = hub.take("num_hidden_layers", default=22)
    every = hub.take("global_attn_every_n_layers", default=3)
    kinds = hub.take("layer_types", default=[_WINDOW if index % every else _FULL for index in range(num_layers)])
    if len(kinds) != num_layers or not set(kinds) <= set(_BASES):
        raise ConfigError(f"config.json: layer_types = {kinds}, expected {num_layers} times {_FULL} or {_WINDOW}")
    return tuple(kinds)


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
    kinds = [_FULL if layer.attention.window is None else _WINDOW for layer in layers]
    rotary = {kind: layer.attention.positions for kind, layer in zip(kinds, layers, strict=True)}
    window = next((layer.attention.window for layer in layers if layer.attention.window is not None), 65)
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
        **unparse_layered_rotary(rotary, attention.head_dim, older=_OLDER, scaled=_FULL),
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
    prefixes = ("model.", "") if config.head else ("", "model.")
    layer, dim = "encoder.layers.{n}.", config.dim
    hidden = config.stack.layers[0].feed_forward.hidden_dim
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
        rename(under(prefixes, "embeddings.tok_embeddings.{p}"), "embeddings.token.{p}"),
        rename(under(prefixes, "embeddings.norm.{p}"), "embeddings.norm.{p}"),
        split(
            under(prefixes, "layers.{n}.attn.Wqkv.{p}"),
            tuple(layer + f"attention.{part}.{{p}}" for part in ("query", "key", "value")),
            (dim, dim, dim),
        ),
        rename(under(prefixes, "layers.{n}.attn.Wo.{p}"), layer + "attention.output.{p}"),
        split(
            under(prefixes, "layers.{n}.mlp.Wi.{p}"),
            (layer + "feed_forward.gate.{p}", layer + "feed_forward.up.{p}"),
            (hidden, hidden),
        ),
        rename(under(prefixes, "layers.{n}.mlp.Wo.{p}"), layer + "feed_forward.down.{p}"),
        rename(under(prefixes, "layers.{n}.attn_norm.{p}"), layer + "attention_residual.norm_in.{p}"),
        rename(under(prefixes, "layers.{n}.mlp_norm.{p}"), layer + "feed_forward_residual.norm_in.{p}"),
        rename(under(prefixes, "final_norm.{p}"), "encoder.norm.{p}"),
        rename("head.dense.{p}", "head.transform.linear.{p}"),
        rename("head.norm.{p}", "head.transform.norm.{p}"),
        *heads,
    )


FAMILY = Family(name="ModernBERT", model_types=("modernbert",), parse=parse, unparse=unparse, rules=rules)
