"""What the files of families share that are encoders with pre-LayerNorm, a gated feed-forward, rotary positions of a
base for each type of layer and windows on both sides: the layers and their weight names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mlxlm.layers import AttentionSpec, BlockSpec, FeedForwardSpec, LayerNormSpec, NoNormSpec, ResidualSpec
from mlxlm.models.config import TransformerConfig
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.layer_types import FULL, WINDOW, parse_layer_types
from mlxlm.models.rotary_config import parse_layered_rotary
from mlxlm.models.weights import Rule, rename, split, under


def parse_layers(
    hub: HubConfig,
    norm: LayerNormSpec,
    *,
    kinds: Sequence[str],
    bases: Mapping[str, float],
    older: Mapping[str, str],
    heads: int,
    hidden_dim: int,
    window: int,
) -> tuple[BlockSpec, ...]:
    """The layers of an encoder of this shape.

    norm: of all, as wide as the model.  kinds: types of the layers, bases and older: rotary bases by type and the keys
    that hold them in the older dialect.  heads, hidden_dim, window: where the config doesn't say; the window counts
    the token in its middle, half the others are on each side.
    """
    dim, heads = norm.dim, hub.take("num_attention_heads", default=heads)
    bias, dropout = hub.take("attention_bias", default=False), hub.take("attention_dropout", default=0.0)
    attention = AttentionSpec(
        dim=dim,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim // heads,
        causal=False,
        bias=bias,
        output_bias=bias,
        dropout=dropout,
    )
    hub.expect("rope_scaling")  # the older dialect has none
    rotary = parse_layered_rotary(hub, dim // heads, bases, older=older, scaled=FULL)
    window = hub.take("local_attention", default=window) // 2 + 1
    by_kind = {
        FULL: replace(attention, positions=rotary[FULL]),
        WINDOW: replace(attention, positions=rotary[WINDOW], window=window),
    }
    feed_forward = FeedForwardSpec(
        dim=dim,
        hidden_dim=hub.take("intermediate_size", default=hidden_dim),
        activation=hub.activation("hidden_activation", default="gelu"),
        gated=True,
        bias=hub.take("mlp_bias", default=False),
        dropout=hub.take("mlp_dropout", default=0.0),
    )
    return tuple(
        BlockSpec(
            attention=by_kind[kind],
            # The embeddings are normed already, so the first layer has no norm here.
            attention_residual=ResidualSpec(norm_in=norm if index else NoNormSpec(), dropout=dropout),
            feed_forward=feed_forward,
            feed_forward_residual=ResidualSpec(norm_in=norm),
        )
        for index, kind in enumerate(parse_layer_types(hub, kinds))
    )


def body_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    """Weight names of the embeddings, the layers and the last norm."""
    prefixes = ("model.", "") if config.head else ("", "model.")
    layer, dim = "encoder.layers.{n}.", config.dim
    hidden = config.stack.layers[0].feed_forward.hidden_dim
    return (
        rename(under(prefixes, "embeddings.tok_embeddings.{p}"), "embeddings.token.{p}"),
        rename(under(prefixes, "embeddings.norm.{p}"), "embeddings.norm.{p}"),
        split(
            under(prefixes, "layers.{n}.attn.Wqkv.{p}"),
            tuple(layer + f"attention.{part}.{{p}}" for part in ("query", "key", "value")),
            (dim, dim, dim),
        ),
        rename(under(prefixes, "layers.{n}.attn.Wo.{p}"), layer + "attention.output.{p}"),
        split(
            under(prefixes, "layers.{n}.mlp.Wi.{p}"),
            (layer + "feed_forward.gate.{p}", layer + "feed_forward.up.{p}"),
            (hidden, hidden),
        ),
        rename(under(prefixes, "layers.{n}.mlp.Wo.{p}"), layer + "feed_forward.down.{p}"),
        rename(under(prefixes, "layers.{n}.attn_norm.{p}"), layer + "attention_residual.norm_in.{p}"),
        rename(under(prefixes, "layers.{n}.mlp_norm.{p}"), layer + "feed_forward_residual.norm_in.{p}"),
        rename(under(prefixes, "final_norm.{p}"), "encoder.norm.{p}"),
    )
