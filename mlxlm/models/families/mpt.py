"""MPT (MosaicML 2023, "Introducing MPT-7B"): pre-LayerNorm without biases anywhere, linear biases for positions, tied
head.

Not verified against transformers, whose code reads neither: `alibi_bias_max` other than 8, and `logit_scale`. As
remembered from the model's own remote code, slopes run down to 2 ** -alibi_bias_max, and logits are multiplied by
logit_scale.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mlxlm.errors import ConfigError
from mlxlm.layers import AlibiSpec, BlockSpec, EmbeddingsSpec, LayerNormSpec
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.family import Family, Layout
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.heads import LanguageModelHeadSpec
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.plain_decoders import fused_in_turn, gguf_keys, logit_scale, plain_block
from mlxlm.models.weights import Rule, under

_CLASSES = ("MptModel", "MptForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    dim = hub.take("d_model", "hidden_size", default=2048)
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_epsilon", default=1e-5), bias=False)
    hub.expect("no_bias", True)
    hub.expect("norm_type", "low_precision_layernorm", "layernorm")
    hub.note("learned_pos_emb")  # without effect beside linear biases
    # How weights are made, gradients scaled, and padding skipped.
    hub.note("init_config", "init_device", "embedding_fraction", "verbose", "param_init_fn", "use_pad_tok_in_ffn")
    embeddings = EmbeddingsSpec(vocab_size=hub.take("vocab_size"), dim=dim, dropout=hub.take("emb_pdrop", default=0.0))
    return assemble(
        hub,
        classes=_CLASSES,
        embeddings=embeddings,
        layers=(_parse_block(hub, norm),) * hub.take("n_layers", "num_hidden_layers", default=24),
        norm=norm,
        tied=True,
        spans=True,
        max_length=hub.take("max_seq_len", default=2048),
        scale=logit_scale(hub.take("logit_scale", default=None), dim),
    )


def _parse_block(hub: HubConfig, norm: LayerNormSpec) -> BlockSpec:
    heads = hub.take("n_heads", "num_attention_heads", default=16)
    inner = HubConfig({"model_type": "mpt", **(hub.take("attn_config", default={}) or {})})
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        inner.expect(name, False)
    inner.expect("attn_type", "multihead_attention")
    inner.expect("alibi", True)
    inner.note("attn_impl")
    block = plain_block(
        norm,
        heads=heads,
        hidden_dim=hub.take("expansion_ratio", default=4) * norm.dim,
        activation="gelu",
        bias=False,
        dropout=hub.take("resid_pdrop", default=0.0),
        attention_dropout=inner.take("attn_pdrop", default=0.0),
        positions=AlibiSpec(num_heads=heads, max_exponent=float(inner.take("alibi_bias_max", default=8))),
        scale=inner.take("softmax_scale", default=None),
        clip=inner.take("clip_qkv", default=None),
    )
    inner.finish()
    return block


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block, attention = config.stack.layers[0], config.stack.layers[0].attention
    exponent = attention.positions.max_exponent
    scale = config.head.scale if isinstance(config.head, LanguageModelHeadSpec) else 1.0
    return {
        **outer_keys(config, "mpt", _CLASSES),
        "d_model": config.dim,
        "n_heads": attention.num_heads,
        "n_layers": len(config.stack.layers),
        "expansion_ratio": block.feed_forward.hidden_dim // config.dim,
        "max_seq_len": config.max_length,
        "layer_norm_epsilon": config.stack.norm.eps,
        "resid_pdrop": block.attention_residual.dropout,
        "emb_pdrop": config.embeddings.dropout,
        "logit_scale": None if scale == 1.0 else scale,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(exponent) if exponent.is_integer() else exponent,
            "attn_pdrop": attention.dropout,
            "clip_qkv": attention.clip,
            "softmax_scale": attention.scale,
        },
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names. Query, key and value are one tensor, one after another."""
    where = prefixes(config, "transformer.")
    names = {
        "attn.out_proj": "attention.output",
        "ffn.up_proj": "feed_forward.up",
        "ffn.down_proj": "feed_forward.down",
        "norm_1": "attention_residual.norm_in",
        "norm_2": "feed_forward_residual.norm_in",
    }
    return (
        *outer_rules(config, where, token="wte", norm="norm_f", tokens_head="classifier"),
        fused_in_turn(under(where, "blocks.{n}.attn.Wqkv.{p}"), config.stack.layers[0].attention),
        *layer_rules(where, "blocks.{n}.", names),
    )


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    ratio, rest = divmod(header.take("feed_forward_length"), values["d_model"])
    if rest:
        raise ConfigError(f"GGUF metadata: {header.prefix}feed_forward_length is no multiple of the width")
    header.expect("attention.head_count_kv", values["n_heads"])
    exponent = header.take("attention.max_alibi_bias", 0.0)
    clip = header.take("attention.clamp_kqv", None)
    values["expansion_ratio"] = ratio
    values["attn_config"] = {"alibi": exponent > 0, "alibi_bias_max": exponent or 8, "clip_qkv": clip}


def _write_gguf(config: TransformerConfig) -> dict[str, Any]:
    block, clip = config.stack.layers[0], config.stack.layers[0].attention.clip
    return {
        "feed_forward_length": block.feed_forward.hidden_dim,
        "attention.max_alibi_bias": block.attention.positions.max_exponent,
        **({} if clip is None else {"attention.clamp_kqv": clip}),
    }


GGUF = GgufDialect(
    architecture="mpt",
    model_type="mpt",
    keys=gguf_keys(length="max_seq_len", width="d_model", layers="n_layers", heads="n_heads", eps="layer_norm_epsilon"),
    rules=partial(gguf_rules, joined=True),
    rotary=False,
    read=_read_gguf,
    write=_write_gguf,
)

FAMILY = Family(name="MPT", model_types=("mpt",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
