"""Names of weights in GGUF files: one vocabulary for all families, in both directions.

Linear weights are (out, in) there, and query, key and value of a fused tensor lie one after another, whatever the hub's
layout is.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlxlm.layers import BlockSpec, NoNormSpec
from mlxlm.models.config import TransformerConfig
from mlxlm.models.weights import Rule, drop, permute, rename, shift, split, tied_copy

_OUTER = {
    "token_embd": "embeddings.token",
    "position_embd": "embeddings.position",
    "token_types": "embeddings.token_type",
    "token_embd_norm": "embeddings.norm",
}
_PARTS = {
    "attn_output": "attention.output",
    "attn_q_norm": "attention.query_norm",
    "attn_k_norm": "attention.key_norm",
    "ffn_down": "feed_forward.down",
}
_SEQUENTIAL = {
    "attn_norm": "attention_residual.norm_in",
    "post_attention_norm": "attention_residual.norm_out",
    "attn_output_norm": "attention_residual.norm_after",
    "ffn_norm": "feed_forward_residual.norm_in",
    "post_ffw_norm": "feed_forward_residual.norm_out",
    "layer_output_norm": "feed_forward_residual.norm_after",
}
_PARALLEL = {"attn_norm": "norm", "ffn_norm": "feed_forward_norm"}
_PROJECTIONS = {"attn_q": "attention.query", "attn_k": "attention.key", "attn_v": "attention.value"}


def gguf_rules(
    config: TransformerConfig,
    *,
    joined: bool = False,
    gate_up: bool = False,
    paired: bool = False,
    norms: Mapping[str, str] | None = None,
) -> tuple[Rule, ...]:
    """Weight names of a model with one stack.

    joined: query, key and value are written as one tensor; either way both are read.  gate_up: so are gate and up.
    paired: query and key rows are stored for interleaved rotary positions.  norms: of a layer, file -> inside, where
    they aren't the usual ones. Norms whose scale is 1 + weight are stored as the sum.
    """
    block = config.stack.layers[0]
    attention, hidden_dim = block.attention, block.feed_forward.hidden_dim
    stack = "encoder" if config.decoder is None else "decoder"
    file, inside = "blk.{n}.", f"{stack}.layers.{{n}}."
    usual = _SEQUENTIAL if isinstance(block, BlockSpec) else _PARALLEL
    offset = 0.0 if config.stack.norm == NoNormSpec() else getattr(config.stack.norm, "offset", 0.0)

    def named(gguf: str, canonical: str) -> Rule:
        if offset and canonical.rpartition(".")[2].endswith(("norm", "norm_in", "norm_out")):
            return shift(f"{gguf}.{{p}}", f"{canonical}.{{p}}", offset)
        return rename(f"{gguf}.{{p}}", f"{canonical}.{{p}}")

    def query_key_value() -> list[Rule]:
        query, key = f"{inside}attention.query.{{p}}", f"{inside}attention.key.{{p}}"
        if paired:
            return [
                permute(file + "attn_q.{p}", query, attention.num_heads),
                permute(file + "attn_k.{p}", key, attention.num_kv_heads),
                named(file + "attn_v", inside + "attention.value"),
            ]
        wide, narrow = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        names = tuple(f"{inside}{name}.{{p}}" for name in _PROJECTIONS.values())
        one = split(file + "attn_qkv.{p}", names, (wide, narrow, narrow))
        three = [named(file + gguf, inside + name) for gguf, name in _PROJECTIONS.items()]
        return [one, *three] if joined else [*three, one]

    gate, up = inside + "feed_forward.gate", inside + "feed_forward.up"
    return (
        *(named(gguf, name) for gguf, name in _OUTER.items()),
        *query_key_value(),
        *(
            [split(file + "ffn_up.{p}", (gate + ".{p}", up + ".{p}"), (hidden_dim, hidden_dim))]
            if gate_up
            else [named(file + "ffn_gate", gate), named(file + "ffn_up", up)]
        ),
        *(named(file + gguf, inside + name) for gguf, name in (_PARTS | dict(norms or usual)).items()),
        named("output_norm", f"{stack}.norm"),
        # A copy of the table may be stored for a tied head; a file that has one is read as untied.
        rename("output.{p}", "head.output.{p}") if config.untied else tied_copy("output.{p}", "embeddings.token.{p}"),
        drop("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
    )
