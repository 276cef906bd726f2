"""GPT-J (Wang and Komatsuzaki 2021, "GPT-J-6B"): attention and feed-forward side by side behind one LayerNorm,
interleaved rotary positions on a part of each head, biases on feed-forward and head.
"""

from __future__ import annotations

from typing import Any

from mlxlm.layers import (
    AttentionSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    LayerNormSpec,
    ParallelBlockSpec,
    RotarySpec,
)
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.family import Family, Layout
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.weights import Rule, drop, under

_CLASSES = ("GPTJModel", "GPTJForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    dim = hub.take("n_embd", "hidden_size", default=4096)
    heads = hub.take("n_head", "num_attention_heads", default=16)
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_epsilon", default=1e-5))
    block = ParallelBlockSpec(
        attention=AttentionSpec(
            dim=dim,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=dim // heads,
            causal=True,
            positions=RotarySpec(dim=hub.take("rotary_dim", default=64), layout="interleaved"),
            dropout=hub.take("attn_pdrop", default=0.0),
        ),
        feed_forward=FeedForwardSpec(
            dim=dim,
            hidden_dim=hub.take("n_inner", default=4 * dim),
            activation=hub.activation("activation_function", default="gelu_new"),
            bias=True,
        ),
        norm=norm,
        dropout=hub.take("resid_pdrop", default=0.0),
    )
    hub.expect("rotary", True)
    hub.expect("scale_attn_weights", True)
    hub.note("n_ctx", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type")
    hub.note("summary_use_proj")
    dropout = hub.take("embd_pdrop", default=0.0)
    return assemble(
        hub,
        classes=_CLASSES,
        embeddings=EmbeddingsSpec(vocab_size=hub.take("vocab_size"), dim=dim, dropout=dropout),
        layers=(block,) * hub.take("n_layer", "num_hidden_layers", default=28),
        norm=norm,
        tied=False,
        bias=True,
        max_length=hub.take("n_positions", "max_position_embeddings", default=2048),
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    return {
        **outer_keys(config, "gptj", _CLASSES),
        "n_embd": config.dim,
        "n_head": block.attention.num_heads,
        "n_layer": len(config.stack.layers),
        "n_inner": block.feed_forward.hidden_dim,
        "n_positions": config.max_length,
        "rotary_dim": block.attention.positions.dim,
        "activation_function": hub_activation(block.feed_forward.activation),
        "layer_norm_epsilon": config.stack.norm.eps,
        "attn_pdrop": block.attention.dropout,
        "resid_pdrop": block.dropout,
        "embd_pdrop": config.embeddings.dropout,
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names; the body stands under `model.` in mlx-lm."""
    where = ("model.", "transformer.", "") if layout == "mlx" else prefixes(config, "transformer.")
    names = {f"attn.{p[0]}_proj": f"attention.{p}" for p in ("query", "key", "value")}
    names |= {
        "attn.out_proj": "attention.output",
        "mlp.fc_in": "feed_forward.up",
        "mlp.fc_out": "feed_forward.down",
        "ln_1": "norm",
    }
    return (
        *outer_rules(config, where, token="wte", norm="ln_f"),
        *layer_rules(where, "h.{n}.", names),
        drop(*under(where, "h.{n}.attn.bias", "h.{n}.attn.masked_bias")),  # buffers of older versions
    )


FAMILY = Family(name="GPT-J", model_types=("gptj",), parse=parse, unparse=unparse, rules=rules)
