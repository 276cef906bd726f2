"""T5, T5 v1.1 and Flan-T5 (Raffel et al. 2019, arXiv:1910.10683): encoder and decoder, pre-RMSNorm, no biases, unscaled
attention, relative position buckets that all layers of a stack share.
"""

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
from mlxlm.models.family import Family, Layout
from mlxlm.models.head_config import parse_task_head, unparse_labels
from mlxlm.models.heads import LanguageModelHeadSpec, TokenHeadSpec
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.weights import Rule, drop, rename, tied_copy


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
    dim, heads = hub.take("d_model", default=512), hub.take("num_heads", default=num_heads)
    head_dim, dropout = hub.take("d_kv", default=64), hub.take("dropout_rate", default=0.1)
    norm = RMSNormSpec(dim=dim, eps=hub.take("layer_norm_epsilon", default=1e-6))
    buckets = RelativeBucketsSpec(
        num_heads=heads,
        bidirectional=True,
        num_buckets=hub.take("relative_attention_num_buckets", default=32),
        max_distance=hub.take("relative_attention_max_distance", default=128),
    )
    encoder_attention = AttentionSpec(
        dim=dim,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        causal=False,
        scale=1.0,
        positions=NoPositionsSpec() if shared else buckets,
        dropout=dropout,
    )
    decoder_buckets = replace(buckets, bidirectional=False)
    decoder_attention = replace(
        encoder_attention, causal=True, positions=NoPositionsSpec() if shared else decoder_buckets
    )
    residual = ResidualSpec(norm_in=norm, dropout=dropout)
    gated, activation = _feed_forward(hub, feed_forward)
    block = BlockSpec(
        attention=encoder_attention,
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
    decoder_block = replace(
        block,
        attention=decoder_attention,
        cross_attention=replace(encoder_attention, positions=NoPositionsSpec()),
        cross_attention_residual=residual,
    )
    num_layers = hub.take("num_layers", default=num_layers)
    num_decoder_layers = hub.take("num_decoder_layers", default=num_layers)
    vocab_size = hub.take("vocab_size", default=vocab_size)
    start = hub.take("decoder_start_token_id", "pad_token_id", default=0)
    hub.expect("is_decoder", False)
    hub.expect("scalable_attention", True)  # a name for the scale of 1
    # The first two follow from feed_forward_proj; relative positions have no end, so n_positions is none.
    hub.note("dense_act_fn", "is_gated_act", "n_positions", "classifier_dropout")
    classes = ("ForConditionalGeneration", "Model", "EncoderModel", "ForTokenClassification")
    supported = ("", *(name + one for one in classes))
    if hub.architecture not in supported:
        raise hub.unsupported_head(*supported[1:])
    tied = hub.take("tie_word_embeddings", default=True)
    of_tokens = hub.architecture == supported[4]
    encoder_only = hub.architecture == supported[3] or of_tokens
    headless = hub.architecture in supported[2:4]
    return TransformerConfig(
        embeddings=EmbeddingsSpec(vocab_size=vocab_size, dim=dim),
        encoder=StackSpec(
            layers=(block,) * num_layers, norm=norm, positions=buckets if shared else None, dropout=dropout
        ),
        decoder=None
        if encoder_only
        else StackSpec(
            layers=(decoder_block,) * num_decoder_layers,
            norm=norm,
            positions=decoder_buckets if shared else None,
            dropout=dropout,
        ),
        head=None
        if headless
        else parse_task_head(hub, name, dim=dim, pooling="mean", dropout=hub.take("classifier_dropout", default=0.0))
        if of_tokens
        else LanguageModelHeadSpec(
            dim=dim,
            vocab_size=vocab_size,
            tied=not hub.contains("lm_head.weight", default=not tied),  # what is stored decides, not what is said
            scale=dim**-0.5 if scaled else 1.0,
        ),
        decoder_start=None if encoder_only else start,
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


def unparse_seq2seq(config: TransformerConfig, *, model_type: str, name: str) -> dict[str, Any]:
    """The config.json keys that every family of this shape has."""
    block = config.encoder.layers[0]  # type: ignore[union-attr]
    attention, feed_forward = block.attention, block.feed_forward
    positions = config.encoder.positions or attention.positions  # type: ignore[union-attr]
    activation = hub_activation(feed_forward.activation)
    if feed_forward.gated:
        activation = "gated-gelu" if feed_forward.activation == "gelu_tanh" else f"gated-{activation}"
    architecture = "ForConditionalGeneration" if config.head else "Model" if config.decoder else "EncoderModel"
    if isinstance(config.head, TokenHeadSpec):
        architecture = "ForTokenClassification"
    decoder_layers = config.decoder.layers if config.decoder else config.encoder.layers  # type: ignore[union-attr]
    return {
        "architectures": [name + architecture],
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
    table = "SelfAttention.relative_attention_bias.weight"
    parts: list[Rule] = []
    for stack, spec in (("encoder", config.encoder), ("decoder", config.decoder)):
        if spec is None:
            continue
        hub, ours, last = f"{stack}.block.{{n}}.layer.", f"{stack}.layers.{{n}}.", 1 if stack == "encoder" else 2
        attentions = [("0.SelfAttention", "attention")]
        attentions += [("1.EncDecAttention", "cross_attention")] if stack == "decoder" else []
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
    shared = ("shared.{p}", "encoder.embed_tokens.{p}", "decoder.embed_tokens.{p}")
    lead = "transformer." if isinstance(config.head, TokenHeadSpec) else ""
    if lead:  # an encoder under a name of its own, with a classifier on top
        parts = [replace(rule, hub=tuple(lead + name for name in rule.hub)) for rule in parts]
        head = rename("classifier.{p}", "head.output.{p}")
    elif config.untied:
        head = rename("lm_head.{p}", "head.output.{p}")
    else:
        head = tied_copy("lm_head.{p}", "embeddings.token.{p}")
    return (
        # Copies of the one table, which some checkpoints hold instead of it.
        rename(tuple(lead + name for name in shared), "embeddings.token.{p}"),
        *parts,
        head,
        drop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    )


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration. Logits are scaled unless the config says that embeddings are not tied."""
    tied = hub.take("tie_word_embeddings", default=True)
    scaled = hub.take("scale_decoder_outputs", default=tied)
    return parse_seq2seq(
        hub, name="T5", scaled=scaled, vocab_size=32128, hidden_dim=2048, num_layers=6, num_heads=8, feed_forward="relu"
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    scaled = not config.predicts_words or config.head.scale != 1.0
    keys = unparse_seq2seq(config, model_type="t5", name="T5")
    # Older readers take the scale from tie_word_embeddings.
    return {**keys, "scale_decoder_outputs": scaled, "tie_word_embeddings": scaled}


FAMILY = Family(name="T5", model_types=("t5",), parse=parse, unparse=unparse, rules=seq2seq_rules)
