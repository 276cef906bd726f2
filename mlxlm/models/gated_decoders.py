"""What the files of families share that are decoders with pre-RMSNorm, rotary positions, grouped heads and a gated
feed-forward (Touvron et al. 2023, arXiv:2302.13971): configuration, weight names and GGUF keys, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlxlm.errors import ConfigError
from mlxlm.layers import (
    AttentionSpec,
    BlockSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    NoNormSpec,
    ResidualSpec,
    RMSNormSpec,
)
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.family import Layout
from mlxlm.models.head_config import architecture, decoder_head_rules, parse_decoder_head, unparse_labels
from mlxlm.models.heads import LanguageModelHeadSpec, SpanHeadSpec
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.rotary_config import parse_rotary, unparse_rotary
from mlxlm.models.weights import Rule, drop, rename, under

# GGUF metadata, without the architecture -> config.json.
GGUF_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


def parse_decoder(
    hub: HubConfig,
    *,
    name: str,
    bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    head_norm: bool = False,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    windows: tuple[int | None, ...] | None = None,
    eps: float = 1e-6,
    rotary: Mapping[str, Any] | None = None,
    spans: bool = False,
) -> TransformerConfig:
    """A decoder of this shape; the families beside it differ by the arguments.

    name: prefix of the transformers classes.  bias, output_bias, mlp_bias: on query/key/value, attention output,
    feed-forward.  head_norm: RMSNorm over each query and key head.  head_dim, num_kv_heads: where the config doesn't
    say, default dim / heads and as many as heads.  windows: of each layer, default none.  eps: of the norms where the
    config doesn't say.  rotary: more arguments of `parse_rotary`.  spans: whether there is a class with a
    head over spans.
    """
    dim, heads = hub.take("hidden_size"), hub.take("num_attention_heads")
    num_layers = hub.take("num_hidden_layers")
    if windows is not None and len(windows) != num_layers:
        raise ConfigError(f"config.json lists {len(windows)} layer_types for {num_layers} layers")
    head_dim = hub.take("head_dim", default=head_dim or dim // heads)
    norm = RMSNormSpec(dim=dim, eps=hub.take("rms_norm_eps", default=eps))
    across_head = RMSNormSpec(dim=head_dim, eps=norm.eps) if head_norm else NoNormSpec()
    attention = AttentionSpec(
        dim=dim,
        num_heads=heads,
        num_kv_heads=hub.take("num_key_value_heads", default=num_kv_heads or heads),
        head_dim=head_dim,
        causal=True,
        positions=parse_rotary(hub, head_dim, **(rotary or {})),
        bias=bias,
        output_bias=output_bias,
        query_norm=across_head,
        key_norm=across_head,
        dropout=hub.take("attention_dropout", default=0.0),
    )
    feed_forward = FeedForwardSpec(
        dim=dim,
        hidden_dim=hub.take("intermediate_size"),
        activation=hub.activation("hidden_act", default="silu"),
        gated=True,
        bias=mlp_bias,
    )
    residual = ResidualSpec(norm_in=norm)
    hub.note("pretraining_tp")  # how one run split its products; the sums are the same
    vocab_size = hub.take("vocab_size")
    tied = hub.take("tie_word_embeddings", default=not hub.contains("lm_head.weight", default=True))
    language_model = LanguageModelHeadSpec(dim=dim, vocab_size=vocab_size, tied=tied)
    return TransformerConfig(
        embeddings=EmbeddingsSpec(vocab_size=vocab_size, dim=dim),
        decoder=StackSpec(
            layers=tuple(
                BlockSpec(
                    attention=replace(attention, window=window),
                    attention_residual=residual,
                    feed_forward=feed_forward,
                    feed_forward_residual=residual,
                )
                for window in (windows or (None,) * num_layers)
            ),
            norm=norm,
        ),
        head=parse_decoder_head(hub, name, dim=dim, language_model=language_model, spans=spans),
        max_length=hub.take("max_position_embeddings", default=None),
    )


def unparse_decoder(config: TransformerConfig, *, model_type: str, name: str) -> dict[str, Any]:
    """The config.json keys that every family of this shape has."""
    layers = config.stack.layers
    attention, feed_forward, norm = layers[0].attention, layers[0].feed_forward, config.stack.norm
    return {
        "architectures": [architecture(config, name, "ForCausalLM")],
        "model_type": model_type,
        "vocab_size": config.embeddings.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": feed_forward.hidden_dim,
        "num_hidden_layers": len(layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": hub_activation(feed_forward.activation),
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": norm.eps,
        "tie_word_embeddings": config.predicts_words and not config.untied,
        "attention_dropout": attention.dropout,
        **unparse_rotary(attention.positions, attention.head_dim),
        **unparse_labels(config),
    }


def decoder_rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names of every family of this shape. Layers and embeddings stand under `model.` when there is a head,
    but under `transformer.` with one over spans.
    """
    prefixes = ("model.", "") if config.head else ("", "model.")
    if isinstance(config.head, SpanHeadSpec):
        prefixes = ("transformer.", *prefixes)
    layer = "decoder.layers.{n}."
    names = {
        "self_attn.q_proj.{p}": "attention.query.{p}",
        "self_attn.k_proj.{p}": "attention.key.{p}",
        "self_attn.v_proj.{p}": "attention.value.{p}",
        "self_attn.o_proj.{p}": "attention.output.{p}",
        "self_attn.q_norm.{p}": "attention.query_norm.{p}",
        "self_attn.k_norm.{p}": "attention.key_norm.{p}",
        "mlp.gate_proj.{p}": "feed_forward.gate.{p}",
        "mlp.up_proj.{p}": "feed_forward.up.{p}",
        "mlp.down_proj.{p}": "feed_forward.down.{p}",
        "input_layernorm.{p}": "attention_residual.norm_in.{p}",
        "post_attention_layernorm.{p}": "feed_forward_residual.norm_in.{p}",
    }
    return (
        rename(under(prefixes, "embed_tokens.{p}"), "embeddings.token.{p}"),
        *(rename(under(prefixes, "layers.{n}." + hub), layer + ours) for hub, ours in names.items()),
        rename(under(prefixes, "norm.{p}"), "decoder.norm.{p}"),
        *decoder_head_rules(config),
        drop(*under(prefixes, "layers.{n}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")),
    )
