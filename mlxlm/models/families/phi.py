"""Phi-1 to Phi-2 (Gunasekar et al. 2023, arXiv:2306.11644; Li et al. 2023, arXiv:2309.05463): attention and
feed-forward side by side behind one LayerNorm, rotary positions on half of each head, biases everywhere, the head
included.
"""

from __future__ import annotations

from typing import Any

from mlxlm.layers import (
    AttentionSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    LayerNormSpec,
    NoNormSpec,
    ParallelBlockSpec,
)
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.family import Family, Layout
from mlxlm.models.gated_decoders import GGUF_KEYS
from mlxlm.models.gguf_dialect import GgufDialect
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.rotary_config import parse_rotary, unparse_rotary
from mlxlm.models.weights import Rule, drop, under

_CLASSES = ("PhiModel", "PhiForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    dim, heads = hub.take("hidden_size"), hub.take("num_attention_heads")
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_eps", default=1e-5))
    # head_dim is no key of this config class, but its code reads it where a config has it.
    head_dim = hub.take("head_dim", default=dim // heads)
    across_head = LayerNormSpec(dim=head_dim, eps=norm.eps) if hub.take("qk_layernorm", default=False) else NoNormSpec()
    block = ParallelBlockSpec(
        attention=AttentionSpec(
            dim=dim,
            num_heads=heads,
            num_kv_heads=hub.take("num_key_value_heads", default=heads),
            head_dim=head_dim,
            causal=True,
            positions=parse_rotary(hub, head_dim, partial=0.5),
            bias=True,
            output_bias=True,
            query_norm=across_head,
            key_norm=across_head,
            dropout=hub.take("attention_dropout", default=0.0),
        ),
        feed_forward=FeedForwardSpec(
            dim=dim,
            hidden_dim=hub.take("intermediate_size"),
            activation=hub.activation("hidden_act", default="gelu_new"),
            bias=True,
        ),
        norm=norm,
        dropout=hub.take("resid_pdrop", default=0.0),
    )
    dropout = hub.take("embd_pdrop", default=0.0)
    return assemble(
        hub,
        classes=_CLASSES,
        embeddings=EmbeddingsSpec(vocab_size=hub.take("vocab_size"), dim=dim, dropout=dropout),
        layers=(block,) * hub.take("num_hidden_layers"),
        norm=norm,
        tied=False,
        bias=True,
        max_length=hub.take("max_position_embeddings", default=None),
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    attention = block.attention
    rotary = unparse_rotary(attention.positions, attention.head_dim)
    return {
        **outer_keys(config, "phi", _CLASSES),
        "hidden_size": config.dim,
        "intermediate_size": block.feed_forward.hidden_dim,
        "num_hidden_layers": len(config.stack.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "hidden_act": hub_activation(block.feed_forward.activation),
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.stack.norm.eps,
        "qk_layernorm": attention.query_norm != NoNormSpec(),
        "attention_dropout": attention.dropout,
        "resid_pdrop": block.dropout,
        "embd_pdrop": config.embeddings.dropout,
        **rotary,
        "partial_rotary_factor": attention.positions.dim / attention.head_dim,
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names."""
    where = prefixes(config, "model.")
    names = {f"self_attn.{p[0]}_proj": f"attention.{p}" for p in ("query", "key", "value")}
    names |= {f"self_attn.{p[0]}_layernorm": f"attention.{p}_norm" for p in ("query", "key")}
    names |= {
        "self_attn.dense": "attention.output",
        "mlp.fc1": "feed_forward.up",
        "mlp.fc2": "feed_forward.down",
        "input_layernorm": "norm",
    }
    return (
        *outer_rules(config, where, token="embed_tokens", norm="final_layernorm"),
        *layer_rules(where, "layers.{n}.", names),
        drop(*under(where, "layers.{n}.self_attn.rotary_emb.inv_freq")),
    )


GGUF = GgufDialect(
    architecture="phi2",
    model_type="phi",
    keys={
        **{gguf: hub for gguf, hub in GGUF_KEYS.items() if hub not in ("rms_norm_eps", "head_dim")},
        "attention.layer_norm_epsilon": "layer_norm_eps",
    },
    rules=gguf_rules,
)

FAMILY = Family(name="Phi", model_types=("phi",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
