"""GPT-2 (Radford et al. 2019): pre-LayerNorm, learned positions, biases everywhere, tanh-GELU, tied head."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from mlxlm.layers import EmbeddingsSpec, LayerNormSpec, LearnedPositionsSpec
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.family import Family, Layout
from mlxlm.models.gguf_dialect import GgufDialect
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.head_config import architecture, decoder_head_rules, parse_decoder_head, unparse_labels
from mlxlm.models.heads import LanguageModelHeadSpec, TokenHeadSpec
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.plain_decoders import fused_in_turn, gguf_keys, plain_block
from mlxlm.models.weights import Rule, drop, rename, transpose, under


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    dim, heads, num_layers = hub.take("n_embd"), hub.take("n_head"), hub.take("n_layer")
    positions = hub.take("n_positions", "n_ctx", default=1024)
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_epsilon", default=1e-5))
    scaled = hub.take("scale_attn_weights", default=True)
    by_layer = hub.take("scale_attn_by_inverse_layer_idx", default=False)
    block = plain_block(
        norm,
        heads=heads,
        hidden_dim=hub.take("n_inner", default=4 * dim),
        activation=hub.activation("activation_function", default="gelu_new"),
        bias=True,
        dropout=hub.take("resid_pdrop", default=0.1),
        attention_dropout=hub.take("attn_pdrop", default=0.1),
        scale=None if scaled else 1.0,
    )
    root = (dim // heads) ** -0.5 if scaled else 1.0
    vocab_size = hub.take("vocab_size")
    tied = hub.take("tie_word_embeddings", default=True)
    hub.expect("add_cross_attention", False)
    hub.note("reorder_and_upcast_attn")  # precision of 16-bit attention; ours accumulates in float32 anyway
    hub.note("n_ctx", "n_special", "predict_special_tokens", "resid_pdrop")
    hub.note(
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"
    )
    language_model = LanguageModelHeadSpec(dim=dim, vocab_size=vocab_size, tied=tied)
    return TransformerConfig(
        embeddings=EmbeddingsSpec(
            vocab_size=vocab_size,
            dim=dim,
            positions=LearnedPositionsSpec(num_positions=positions, dim=dim),
            dropout=hub.take("embd_pdrop", default=0.1),
        ),
        decoder=StackSpec(
            layers=tuple(
                replace(block, attention=replace(block.attention, scale=root / (index + 1)))
                if by_layer and index
                else block
                for index in range(num_layers)
            ),
            norm=norm,
        ),
        head=parse_decoder_head(hub, "GPT2", dim=dim, language_model=language_model, suffix="LMHeadModel", spans=True),
        max_length=positions,
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    layers = config.stack.layers
    block, embeddings = layers[0], config.embeddings
    attention, root = block.attention, block.attention.head_dim**-0.5
    by_layer = len(layers) > 1 and layers[1].attention.scale != attention.scale
    return {
        "architectures": [architecture(config, "GPT2", "LMHeadModel")],
        "model_type": "gpt2",
        "vocab_size": embeddings.vocab_size,
        "n_embd": config.dim,
        "n_head": attention.num_heads,
        "n_layer": len(layers),
        "n_positions": config.max_length,
        "n_ctx": config.max_length,  # the same to transformers, and mlx-lm asks for it
        "n_inner": block.feed_forward.hidden_dim,
        "activation_function": hub_activation(block.feed_forward.activation),
        "layer_norm_epsilon": config.stack.norm.eps,
        "scale_attn_weights": attention.scale in (None, root),
        "scale_attn_by_inverse_layer_idx": by_layer,
        "attn_pdrop": attention.dropout,
        "resid_pdrop": block.attention_residual.dropout,
        "embd_pdrop": embeddings.dropout,
        "tie_word_embeddings": not config.untied,
        **unparse_labels(config),
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names. Linear weights are stored (in, out) by transformers and (out, in) by mlx-lm."""
    if layout == "mlx":
        prefixes, linear = ("model.", "transformer.", ""), rename
    else:
        prefixes, linear = (("transformer.", "") if config.head else ("", "transformer.")), transpose
    layer = "decoder.layers.{n}."
    head = decoder_head_rules(config)
    if type(config.head) is TokenHeadSpec:
        head = (rename("classifier.{p}", "head.output.{p}"),)
    return (
        rename(under(prefixes, "wte.{p}"), "embeddings.token.{p}"),
        rename(under(prefixes, "wpe.{p}"), "embeddings.position.{p}"),
        rename(under(prefixes, "h.{n}.ln_1.{p}"), layer + "attention_residual.norm_in.{p}"),
        rename(under(prefixes, "h.{n}.ln_2.{p}"), layer + "feed_forward_residual.norm_in.{p}"),
        drop(*under(prefixes, "h.{n}.attn.bias", "h.{n}.attn.masked_bias")),
        fused_in_turn(
            under(prefixes, "h.{n}.attn.c_attn.{p}"), config.stack.layers[0].attention, transposed=layout == "hub"
        ),
        linear(under(prefixes, "h.{n}.attn.c_proj.{p}"), layer + "attention.output.{p}"),
        linear(under(prefixes, "h.{n}.mlp.c_fc.{p}"), layer + "feed_forward.up.{p}"),
        linear(under(prefixes, "h.{n}.mlp.c_proj.{p}"), layer + "feed_forward.down.{p}"),
        rename(under(prefixes, "ln_f.{p}"), "decoder.norm.{p}"),
        *head,
    )


GGUF_KEYS = gguf_keys(
    length="n_positions",
    width="n_embd",
    hidden="n_inner",
    layers="n_layer",
    heads="n_head",
    eps="layer_norm_epsilon",
)
GGUF = GgufDialect(
    architecture="gpt2",
    model_type="gpt2",
    keys=GGUF_KEYS,
    rules=partial(gguf_rules, joined=True),
    rotary=False,
    read=lambda header, values: header.expect("attention.head_count_kv", values["n_head"]),
)

FAMILY = Family(
    name="GPT-2",
    model_types=("gpt2",),
    parse=parse,
    unparse=unparse,
    rules=rules,
    gguf=GGUF,
    mlx_keys=("n_ctx",),
)
