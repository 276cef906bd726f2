"""What the files of post-norm encoder families share: their configuration and weight names, in both directions."""

from __future__ import annotations

from typing import Any

from mlxlm.layers import (
    AttentionSpec,
    BlockSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    LayerNormSpec,
    LearnedPositionsSpec,
    ResidualSpec,
)
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.head_config import architecture, parse_task_head, unparse_labels
from mlxlm.models.heads import HeadSpec, LanguageModelHeadSpec, PoolerSpec, SequenceHeadSpec, TransformSpec
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.weights import Rule, drop, rename, tied_copy, under


def parse_encoder(
    hub: HubConfig, *, name: str, masked: str, vocab_size: int, first: int = 0, activation: str | None = None
) -> TransformerConfig:
    """An encoder of this shape; the families beside it differ by the arguments.

    name: prefix of the transformers classes.  masked: a weight that tells that there is a masked-language-model head.
    vocab_size: where the config doesn't say.  first: row of position 0.  activation: of that head, default as in the
    layers.
    """
    dim, heads = hub.take("hidden_size", default=768), hub.take("num_attention_heads", default=12)
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_eps", default=1e-12))
    dropout = hub.take("hidden_dropout_prob", default=0.1)
    inner = hub.activation("hidden_act", default="gelu")
    vocab_size = hub.take("vocab_size", default=vocab_size)
    positions = hub.take("max_position_embeddings", default=512) - first
    residual = ResidualSpec(norm_after=norm, dropout=dropout)
    block = BlockSpec(
        attention=AttentionSpec(
            dim=dim,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=dim // heads,
            causal=False,
            bias=True,
            output_bias=True,
            dropout=hub.take("attention_probs_dropout_prob", default=0.1),
        ),
        attention_residual=residual,
        feed_forward=FeedForwardSpec(
            dim=dim, hidden_dim=hub.take("intermediate_size", default=3072), activation=inner, bias=True
        ),
        feed_forward_residual=residual,
    )
    hub.expect("is_decoder", False)
    hub.expect("add_cross_attention", False)
    hub.expect("position_embedding_type", "absolute")
    hub.note("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers")
    hub.note("pooler_size_per_head", "pooler_type")
    tied = hub.take("tie_word_embeddings", default=True)
    head: HeadSpec | None = parse_task_head(
        hub,
        name,
        dim=dim,
        pooling="first",
        dropout=hub.take("classifier_dropout", default=dropout),
        transform=TransformSpec(dim=dim, activation="tanh"),
    )
    bare, of_words = hub.architecture in ("", f"{name}Model"), hub.architecture == f"{name}ForMaskedLM"
    pretraining = hub.architecture == f"{name}ForPreTraining"
    # Checkpoints keep more or less than their class needs (the original ones hold pooler and both heads), so the
    # weights decide where they are at hand.
    if head is None and hub.contains(masked, of_words or pretraining or hub.architecture == ""):
        transform = TransformSpec(dim=dim, activation=activation or inner, norm=norm)
        head = LanguageModelHeadSpec(dim=dim, vocab_size=vocab_size, tied=tied, bias=True, transform=transform)
    pooled = hub.contains("pooler.dense.weight", bare or pretraining) and not isinstance(head, SequenceHeadSpec)
    next_sentence = hub.contains("cls.seq_relationship.weight", pretraining)
    return TransformerConfig(
        embeddings=EmbeddingsSpec(
            vocab_size=vocab_size,
            dim=dim,
            positions=LearnedPositionsSpec(num_positions=positions, dim=dim, first=first),
            num_token_types=hub.take("type_vocab_size", default=2),
            norm=norm,
            dropout=dropout,
        ),
        encoder=StackSpec(layers=(block,) * hub.take("num_hidden_layers", default=12)),
        head=head,
        pooler=PoolerSpec(dim=dim, next_sentence=next_sentence) if pooled else None,
        max_length=positions,
    )


def unparse_encoder(config: TransformerConfig, *, model_type: str, name: str) -> dict[str, Any]:
    """The config.json keys that every family of this shape has."""
    block, embeddings, positions = config.stack.layers[0], config.embeddings, config.embeddings.positions
    return {
        "architectures": [architecture(config, name, "ForMaskedLM")],
        "model_type": model_type,
        "vocab_size": embeddings.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": len(config.stack.layers),
        "num_attention_heads": block.attention.num_heads,
        "intermediate_size": block.feed_forward.hidden_dim,
        "hidden_act": hub_activation(block.feed_forward.activation),
        "hidden_dropout_prob": embeddings.dropout,
        "attention_probs_dropout_prob": block.attention.dropout,
        "classifier_dropout": getattr(config.head, "dropout", None),
        "max_position_embeddings": positions.num_positions + positions.first,  # type: ignore[union-attr]
        "type_vocab_size": embeddings.num_token_types,
        "layer_norm_eps": embeddings.norm.eps,
        "tie_word_embeddings": not config.untied,
        **unparse_labels(config),
    }


def norm_rules(where: tuple[str, ...], hub: str, canonical: str) -> tuple[Rule, ...]:
    """A LayerNorm, whose weight and bias the oldest checkpoints call gamma and beta."""
    return (
        rename(under(where, hub + ".weight", hub + ".gamma"), canonical + ".weight"),
        rename(under(where, hub + ".bias", hub + ".beta"), canonical + ".bias"),
    )


def encoder_rules(config: TransformerConfig, base: str) -> tuple[Rule, ...]:
    """Weight names of everything but the heads.  base: the name under which they stand when there is a head."""
    prefixes = (f"{base}.", "") if config.head else ("", f"{base}.")
    layer, ours = "encoder.layer.{n}.", "encoder.layers.{n}."
    return (
        rename(under(prefixes, "embeddings.word_embeddings.{p}"), "embeddings.token.{p}"),
        rename(under(prefixes, "embeddings.position_embeddings.{p}"), "embeddings.position.{p}"),
        rename(under(prefixes, "embeddings.token_type_embeddings.{p}"), "embeddings.token_type.{p}"),
        *norm_rules(prefixes, "embeddings.LayerNorm", "embeddings.norm"),
        drop(*under(prefixes, "embeddings.position_ids")),
        rename(under(prefixes, layer + "attention.self.query.{p}"), ours + "attention.query.{p}"),
        rename(under(prefixes, layer + "attention.self.key.{p}"), ours + "attention.key.{p}"),
        rename(under(prefixes, layer + "attention.self.value.{p}"), ours + "attention.value.{p}"),
        rename(under(prefixes, layer + "attention.output.dense.{p}"), ours + "attention.output.{p}"),
        *norm_rules(prefixes, layer + "attention.output.LayerNorm", ours + "attention_residual.norm_after"),
        rename(under(prefixes, layer + "intermediate.dense.{p}"), ours + "feed_forward.up.{p}"),
        rename(under(prefixes, layer + "output.dense.{p}"), ours + "feed_forward.down.{p}"),
        *norm_rules(prefixes, layer + "output.LayerNorm", ours + "feed_forward_residual.norm_after"),
    )


def masked_output_rules(config: TransformerConfig, head: str) -> tuple[Rule, ...]:
    """The projection of a masked language model's head, whose bias is stored twice.

    head: prefix of the head's weights. Of a tied head the outer bias counts, of another the projection's own;
    checkpoints of transformers 4 have one and the same under either name.
    """
    if config.untied:
        return (
            rename((head + "decoder.bias", head + "bias"), "head.output.bias"),
            rename(head + "decoder.weight", "head.output.weight"),
        )
    return (
        rename((head + "bias", head + "decoder.bias"), "head.bias"),
        tied_copy(head + "decoder.weight", "embeddings.token.weight"),
    )
