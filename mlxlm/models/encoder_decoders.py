"""What the files of encoder-decoder families share: their configuration and their weight names, in both directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxlm.errors import UnsupportedModelError
from mlxlm.layers import (
    AttentionSpec,
    BlockSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    NoPositionsSpec,
    RelativeBucketsSpec,
    ResidualSpec,
    RMSNormSpec,
)
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.family import Layout
from mlxlm.models.head_config import TASKS, architecture, parse_task_head, unparse_labels
from mlxlm.models.heads import (
    HeadSpec,
    LanguageModelHeadSpec,
    SequenceHeadSpec,
    SpanHeadSpec,
    TokenHeadSpec,
    TransformSpec,
)
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.weights import Rule, drop, rename, tied_copy, under

_WORDS, _BARE, _ENCODER = "ForConditionalGeneration", "Model", "EncoderModel"


def parse_seq2seq(
    hub: HubConfig,
    *,
    name: str,
    scaled: bool,
    shared: bool = True,
    vocab_size: int = 250112,
    hidden_dim: int = 1024,
    num_layers: int = 8,
    num_heads: int = 6,
    feed_forward: str = "gated-gelu",
) -> TransformerConfig:
    """A model of this shape; the families differ by the arguments.

    name: prefix of the transformers classes.  scaled: logits are multiplied by dim ** -0.5.  shared: all layers of a
    stack have one table of relative positions, else each has its own.  The rest holds for absent keys.
    """
    task = hub.architecture.removeprefix(name)
    supported = (_WORDS, _BARE, _ENCODER, *TASKS.values())
    if hub.architecture and (not hub.architecture.startswith(name) or task not in supported):
        raise hub.unsupported_head(*(name + one for one in supported))
    encoder_only = task in (_ENCODER, TASKS[TokenHeadSpec])
    block, buckets = _encoder_block(hub, num_heads=num_heads, hidden_dim=hidden_dim, feed_forward=feed_forward)
    dim, dropout = block.attention.dim, block.attention.dropout
    num_layers = hub.take("num_layers", default=num_layers)
    num_decoder_layers = hub.take("num_decoder_layers", default=num_layers)
    vocab_size = hub.take("vocab_size", default=vocab_size)
    start = hub.take("decoder_start_token_id", "pad_token_id", default=0)
    hub.expect("is_decoder", False)
    hub.expect("scalable_attention", True)  # a name for the scale of 1
    # The first two follow from feed_forward_proj; relative positions have no end, so n_positions is none.
    hub.note("dense_act_fn", "is_gated_act", "n_positions", "classifier_dropout")

    def stack(layer: BlockSpec, count: int, positions: RelativeBucketsSpec) -> StackSpec:
        if not shared:
            layer = replace(layer, attention=replace(layer.attention, positions=positions))
        norm = layer.attention_residual.norm_in
        shared_positions = positions if shared else None
        return StackSpec(layers=(layer,) * count, norm=norm, positions=shared_positions, dropout=dropout)

    decoder_block = replace(
        block,
        attention=replace(block.attention, causal=True),
        cross_attention=block.attention,
        cross_attention_residual=block.attention_residual,
    )
    return TransformerConfig(
        embeddings=EmbeddingsSpec(vocab_size=vocab_size, dim=dim),
        encoder=stack(block, num_layers, buckets),
        decoder=None
        if encoder_only
        else stack(decoder_block, num_decoder_layers, replace(buckets, bidirectional=False)),
        head=_head(hub, name, dim=dim, vocab_size=vocab_size, scale=dim**-0.5 if scaled else 1.0),
        decoder_start=None if encoder_only else start,
    )


def _encoder_block(
    hub: HubConfig, *, num_heads: int, hidden_dim: int, feed_forward: str
) -> tuple[BlockSpec, RelativeBucketsSpec]:
    """A block of the encoder, without positions, and the positions of its attention."""
    dim, heads = hub.take("d_model", default=512), hub.take("num_heads", default=num_heads)
    dropout = hub.take("dropout_rate", default=0.1)
    residual = ResidualSpec(
        norm_in=RMSNormSpec(dim=dim, eps=hub.take("layer_norm_epsilon", default=1e-6)), dropout=dropout
    )
    gated, activation = _feed_forward(hub, feed_forward)
    block = BlockSpec(
        attention=AttentionSpec(
            dim=dim,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hub.take("d_kv", default=64),
            causal=False,
            scale=1.0,
            positions=NoPositionsSpec(),
            dropout=dropout,
        ),
        attention_residual=residual,
        feed_forward=FeedForwardSpec(
            dim=dim,
            hidden_dim=hub.take("d_ff", default=hidden_dim),
            activation=activation,
            gated=gated,
            dropout=dropout,
        ),
        feed_forward_residual=residual,
    )
    return block, RelativeBucketsSpec(
        num_heads=heads,
        bidirectional=True,
        num_buckets=hub.take("relative_attention_num_buckets", default=32),
        max_distance=hub.take("relative_attention_max_distance", default=128),
    )


def _feed_forward(hub: HubConfig, default: str) -> tuple[bool, str]:
    """Whether it is gated, and its activation, from a value such as "relu" or "gated-gelu"."""
    value = hub.take("feed_forward_proj", default=default)
    kind, _, name = value.rpartition("-")
    if kind not in ("", "gated"):
        raise UnsupportedModelError(f"config.json: feed_forward_proj = {value!r} is neither NAME nor gated-NAME")
    if value == "gated-gelu":
        name = "gelu_new"  # the checkpoints that say so were trained with the tanh approximation
    return kind == "gated", HubConfig({"feed_forward_proj": name}).activation("feed_forward_proj")


def _head(hub: HubConfig, name: str, *, dim: int, vocab_size: int, scale: float) -> HeadSpec | None:
    tied = hub.take("tie_word_embeddings", default=True)
    if hub.architecture in (name + _BARE, name + _ENCODER):
        return None
    # There is no dropout before a head over spans.
    spans = hub.architecture == name + TASKS[SpanHeadSpec]
    of_labels = parse_task_head(
        hub,
        name,
        dim=dim,
        pooling="last",
        dropout=0.0 if spans else hub.take("classifier_dropout", default=0.0),
        transform=TransformSpec(dim=dim, activation="tanh"),
    )
    return of_labels or LanguageModelHeadSpec(
        dim=dim,
        vocab_size=vocab_size,
        tied=not hub.contains("lm_head.weight", default=not tied),  # what is stored decides, not what is said
        scale=scale,
    )


def unparse_seq2seq(config: TransformerConfig, *, model_type: str, name: str) -> dict[str, Any]:
    """The config.json keys that every family of this shape has."""
    block = config.encoder.layers[0]  # type: ignore[union-attr]
    attention, feed_forward = block.attention, block.feed_forward
    positions = config.encoder.positions or attention.positions  # type: ignore[union-attr]
    activation = hub_activation(feed_forward.activation)
    if feed_forward.gated:
        activation = "gated-gelu" if feed_forward.activation == "gelu_tanh" else f"gated-{activation}"
    decoder_layers = config.decoder.layers if config.decoder else config.encoder.layers  # type: ignore[union-attr]
    return {
        "architectures": [
            architecture(config, name, _WORDS) if config.head or config.decoder else name + _ENCODER,
        ],
        "model_type": model_type,
        "is_encoder_decoder": config.decoder is not None,
        "vocab_size": config.embeddings.vocab_size,
        "d_model": config.dim,
        "d_kv": attention.head_dim,
        "d_ff": feed_forward.hidden_dim,
        "num_layers": len(config.encoder.layers),  # type: ignore[union-attr]
        "num_decoder_layers": len(decoder_layers),
        "num_heads": attention.num_heads,
        "relative_attention_num_buckets": positions.num_buckets,
        "relative_attention_max_distance": positions.max_distance,
        "dropout_rate": attention.dropout,
        "layer_norm_epsilon": block.attention_residual.norm_in.eps,
        "feed_forward_proj": activation,
        "decoder_start_token_id": config.decoder_start,
        **({"classifier_dropout": config.head.dropout} if isinstance(config.head, TokenHeadSpec) else {}),
        **unparse_labels(config),
    }


def seq2seq_rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names of every family of this shape."""
    # The body stands under a name of its own below a classifier of tokens or sequences, elsewhere at the top.
    inner = isinstance(config.head, TokenHeadSpec) and not isinstance(config.head, SpanHeadSpec)
    where = ("transformer.", "") if inner else ("", "transformer.")
    shared = ("shared.{p}", "encoder.embed_tokens.{p}", "decoder.embed_tokens.{p}")
    parts = [rule for stack in ("encoder", "decoder") for rule in _stack_rules(config, stack)]
    return (
        # Copies of the one table, which some checkpoints hold instead of it.
        rename(under(where, *shared), "embeddings.token.{p}"),
        *(replace(rule, hub=under(where, *rule.hub)) for rule in parts),
        *_head_rules(config),
        drop(*under(where, "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")),
    )


def _stack_rules(config: TransformerConfig, stack: str) -> list[Rule]:
    spec = getattr(config, stack)
    if spec is None:
        return []
    table = "SelfAttention.relative_attention_bias.weight"
    hub, ours, last = f"{stack}.block.{{n}}.layer.", f"{stack}.layers.{{n}}.", 1 if stack == "encoder" else 2
    attentions = [("0.SelfAttention", "attention")]
    attentions += [("1.EncDecAttention", "cross_attention")] if stack == "decoder" else []
    parts = []
    for where, name in attentions:
        for theirs, projection in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            parts.append(rename(f"{hub}{where}.{theirs}.{{p}}", f"{ours}{name}.{projection}.{{p}}"))
        parts.append(rename(f"{hub}{where[0]}.layer_norm.{{p}}", f"{ours}{name}_residual.norm_in.{{p}}"))
    gated = spec.layers[0].feed_forward.gated
    inner = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    for theirs, name in {**inner, "wo": "down"}.items():
        parts.append(rename(f"{hub}{last}.DenseReluDense.{theirs}.{{p}}", f"{ours}feed_forward.{name}.{{p}}"))
    parts.append(rename(f"{hub}{last}.layer_norm.{{p}}", f"{ours}feed_forward_residual.norm_in.{{p}}"))
    if spec.positions is not None:
        parts.append(rename(f"{stack}.block.0.layer.0.{table}", f"{stack}.positions.weight"))
    else:
        parts.append(rename(f"{hub}0.{table}", f"{ours}attention.positions.weight"))
    parts.append(rename(f"{stack}.final_layer_norm.{{p}}", f"{stack}.norm.{{p}}"))
    return parts


def _head_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    head = config.head
    if isinstance(head, SpanHeadSpec):
        return (rename("qa_outputs.{p}", "head.output.{p}"),)
    if isinstance(head, SequenceHeadSpec):
        return (
            rename("classification_head.dense.{p}", "head.transform.linear.{p}"),
            rename("classification_head.out_proj.{p}", "head.output.{p}"),
        )
    if isinstance(head, TokenHeadSpec):
        return (rename("classifier.{p}", "head.output.{p}"),)
    if config.untied:
        return (rename("lm_head.{p}", "head.output.{p}"),)
    return (tied_copy("lm_head.{p}", "embeddings.token.{p}"),)
