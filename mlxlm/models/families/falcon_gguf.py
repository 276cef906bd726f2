"""Falcon in GGUF files: what their metadata and tensors say of its config, and the way back."""

from __future__ import annotations

from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.plain_decoders import gguf_keys
from mlxlm.models.weights import Rule

_SECOND_NORM = "blk.0.attn_norm_2.weight"


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    header.expect("tensor_data_layout", "jploski")  # query, key and value one after another
    shared, two_norms = values.setdefault("num_kv_heads", values["num_attention_heads"]), _SECOND_NORM in header.tensors
    values["new_decoder_architecture"] = two_norms or 1 < shared < values["num_attention_heads"]
    values["num_ln_in_parallel_attn"] = 2 if two_norms else 1
    values["multi_query"] = shared == 1
    values["bias"] = "blk.0.attn_qkv.bias" in header.tensors


def _gguf_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    """Weight names in a GGUF file: with two norms, that of the feed-forward has the name of the only one elsewhere."""
    two = getattr(config.stack.layers[0], "feed_forward_norm", None) is not None
    norms = {"attn_norm_2": "norm", "attn_norm": "feed_forward_norm"} if two else None
    return gguf_rules(config, joined=True, norms=norms)


GGUF = GgufDialect(
    architecture="falcon",
    model_type="falcon",
    keys=gguf_keys(
        length="max_position_embeddings",
        width="hidden_size",
        hidden="ffn_hidden_size",
        layers="num_hidden_layers",
        heads="num_attention_heads",
        kv_heads="num_kv_heads",
        eps="layer_norm_epsilon",
    ),
    rules=_gguf_rules,
    read=_read_gguf,
    write=lambda config: {"tensor_data_layout": "jploski"},
)
