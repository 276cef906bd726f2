"""ChatGLM in GGUF files: what their metadata and tensors say of its config. Written by converters for GLM-4 too."""

from __future__ import annotations

from functools import partial
from typing import Any

from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_rotary import write_rotary
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.plain_decoders import gguf_keys


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    shared = values.setdefault("multi_query_group_num", values["num_attention_heads"])
    values["multi_query_attention"] = shared != values["num_attention_heads"]
    values["kv_channels"] = header.head_dim
    values["add_qkv_bias"] = any(name in header.tensors for name in ("blk.0.attn_qkv.bias", "blk.0.attn_q.bias"))
    values["rope_ratio"] = header.take("rope.freq_base", 10000.0) / 10000.0
    header.expect("rope.dimension_count", header.head_dim // 2)


GGUF = GgufDialect(
    architecture="chatglm",
    model_type="chatglm",
    keys=gguf_keys(
        length="seq_length",
        width="hidden_size",
        hidden="ffn_hidden_size",
        layers="num_layers",
        heads="num_attention_heads",
        kv_heads="multi_query_group_num",
        head_dim="kv_channels",
        rms_eps="layernorm_epsilon",
    ),
    rules=partial(gguf_rules, joined=True, gate_up=True),
    rotary=False,
    read=_read_gguf,
    write=write_rotary,
)
