"""GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373): attention and
feed-forward side by side behind a LayerNorm each, rotary positions on a quarter of each head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mlxlm.layers import (
    AttentionSpec,
    BlockSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    LayerNormSpec,
    ParallelBlockSpec,
    ResidualSpec,
)
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import QKV, assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.family import Family, Layout
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.rotary_config import parse_rotary, unparse_rotary
from mlxlm.models.weights import Rule, drop, rename, split_heads, tied_copy, under

_CLASSES = ("GPTNeoXModel", "GPTNeoXForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    dim, heads = hub.take("hidden_size"), hub.take("num_attention_heads")
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_eps", default=1e-5))
    bias = hub.take("attention_bias", default=True)
    dropout = hub.take("hidden_dropout", default=0.0)
    parts = {
        "attention": AttentionSpec(
            dim=dim,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=dim // heads,
            causal=True,
            positions=parse_rotary(hub, dim // heads, partial=0.25),
            bias=bias,
            output_bias=bias,
            dropout=hub.take("attention_dropout", default=0.0),
        ),
        "feed_forward": FeedForwardSpec(
            dim=dim,
            hidden_dim=hub.take("intermediate_size"),
            activation=hub.activation("hidden_act", default="gelu"),
            bias=True,
        ),
    }
    residual = ResidualSpec(norm_in=norm, dropout=dropout)
    if hub.take("use_parallel_residual", default=True):
        block = ParallelBlockSpec(**parts, norm=norm, feed_forward_norm=norm, dropout=dropout)
    else:
        block = BlockSpec(**parts, attention_residual=residual, feed_forward_residual=residual)
    hub.note("classifier_dropout", "is_decoder")
    return assemble(
        hub,
        classes=_CLASSES,
        embeddings=EmbeddingsSpec(vocab_size=hub.take("vocab_size"), dim=dim, dropout=dropout),
        layers=(block,) * hub.take("num_hidden_layers"),
        norm=norm,
        tied=False,
        spans=True,
        max_length=hub.take("max_position_embeddings", default=2048),
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    attention = block.attention
    rotary = unparse_rotary(attention.positions, attention.head_dim)
    return {
        **outer_keys(config, "gpt_neox", _CLASSES),
        "hidden_size": config.dim,
        "intermediate_size": block.feed_forward.hidden_dim,
        "num_hidden_layers": len(config.stack.layers),
        "num_attention_heads": attention.num_heads,
        "hidden_act": hub_activation(block.feed_forward.activation),
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.stack.norm.eps,
        "use_parallel_residual": isinstance(block, ParallelBlockSpec),
        "attention_bias": attention.bias,
        "attention_dropout": attention.dropout,
        "hidden_dropout": config.embeddings.dropout,
        "rotary_emb_base": rotary["rope_theta"],
        "rotary_pct": attention.positions.dim / attention.head_dim,
        "rope_scaling": rotary["rope_scaling"],
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names. mlx-lm puts the layers elsewhere, and the head with the body."""
    where, layer = prefixes(config, "gpt_neox."), "layers.{n}."
    if layout == "mlx":
        where, layer = ("model.", *where), "h.{n}."
    parallel = isinstance(config.stack.layers[0], ParallelBlockSpec)
    names = {
        "attention.dense": "attention.output",
        "mlp.dense_h_to_4h": "feed_forward.up",
        "mlp.dense_4h_to_h": "feed_forward.down",
        "input_layernorm": "norm" if parallel else "attention_residual.norm_in",
        "post_attention_layernorm": "feed_forward_norm" if parallel else "feed_forward_residual.norm_in",
    }
    heads = config.stack.layers[0].attention.num_heads
    embed_out = ("model.embed_out.{p}", "embed_out.{p}") if layout == "mlx" else ("embed_out.{p}", "lm_head.{p}")
    return (
        rename(embed_out, "head.output.{p}") if config.untied else tied_copy(embed_out, "embeddings.token.{p}"),
        *outer_rules(config, where, token="embed_in", norm="final_layer_norm", tokens_head="classifier"),
        split_heads(under(where, layer + "attention.query_key_value.{p}"), QKV, heads, (1, 1, 1)),
        *layer_rules(where, layer, names),
        # Buffers of older versions.
        drop(
            *under(where, layer + "attention.bias", layer + "attention.masked_bias"),
            *under(where, layer + "attention.rotary_emb.inv_freq"),
        ),
    )


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    values["use_parallel_residual"] = header.take("use_parallel_residual", True)
    values["attention_bias"] = any(name in header.tensors for name in ("blk.0.attn_qkv.bias", "blk.0.attn_q.bias"))


GGUF = GgufDialect(
    architecture="gptneox",
    model_type="gpt_neox",
    keys={
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.layer_norm_epsilon": "layer_norm_eps",
    },
    rules=partial(gguf_rules, joined=True),
    read=_read_gguf,
    write=lambda config: {"use_parallel_residual": isinstance(config.stack.layers[0], ParallelBlockSpec)},
)

FAMILY = Family(name="GPT-NeoX", model_types=("gpt_neox",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
