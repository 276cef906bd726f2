"""PaLM (Chowdhery et al. 2022, arXiv:2204.02311): attention and feed-forward side by side behind one LayerNorm, one
key/value head, SwiGLU, rotary positions, no biases, a tied head whose logits are divided by the root of the width.

There are no public checkpoints and so no keys and names to follow: these are those of the decoders beside it.
"""

from __future__ import annotations

from typing import Any

from mlxlm.layers import AttentionSpec, EmbeddingsSpec, FeedForwardSpec, LayerNormSpec, ParallelBlockSpec
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.family import Family, Layout
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.rotary_config import parse_rotary, unparse_rotary
from mlxlm.models.weights import Rule

_CLASSES = ("PalmModel", "PalmForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    dim, heads = hub.take("hidden_size"), hub.take("num_attention_heads")
    head_dim = hub.take("head_dim", default=256)
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_eps", default=1e-5), bias=False)
    block = ParallelBlockSpec(
        attention=AttentionSpec(
            dim=dim,
            num_heads=heads,
            num_kv_heads=hub.take("num_key_value_heads", default=1),
            head_dim=head_dim,
            causal=True,
            positions=parse_rotary(hub, head_dim),
        ),
        feed_forward=FeedForwardSpec(
            dim=dim,
            hidden_dim=hub.take("intermediate_size", default=4 * dim),
            activation=hub.activation("hidden_act", default="silu"),
            gated=True,
        ),
        norm=norm,
    )
    return assemble(
        hub,
        classes=_CLASSES,
        embeddings=EmbeddingsSpec(vocab_size=hub.take("vocab_size"), dim=dim),
        layers=(block,) * hub.take("num_hidden_layers"),
        norm=norm,
        tied=True,
        max_length=hub.take("max_position_embeddings", default=2048),
        scale=dim**-0.5,
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    return {
        **outer_keys(config, "palm", _CLASSES),
        "hidden_size": config.dim,
        "intermediate_size": block.feed_forward.hidden_dim,
        "num_hidden_layers": len(config.stack.layers),
        "num_attention_heads": block.attention.num_heads,
        "num_key_value_heads": block.attention.num_kv_heads,
        "head_dim": block.attention.head_dim,
        "hidden_act": hub_activation(block.feed_forward.activation),
        "layer_norm_eps": config.stack.norm.eps,
        "max_position_embeddings": config.max_length,
        **unparse_rotary(block.attention.positions, block.attention.head_dim),
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names."""
    where = prefixes(config, "model.")
    names = {f"self_attn.{p[0]}_proj": f"attention.{p}" for p in ("query", "key", "value", "output")}
    names |= {f"mlp.{p}_proj": f"feed_forward.{p}" for p in ("gate", "up", "down")}
    names["input_layernorm"] = "norm"
    return (
        *outer_rules(config, where, token="embed_tokens", norm="norm"),
        *layer_rules(where, "layers.{n}.", names),
    )


FAMILY = Family(
    name="PaLM",
    model_types=("palm",),
    parse=parse,
    unparse=unparse,
    rules=rules,
    reference="a forward pass in numpy",
)
