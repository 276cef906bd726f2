"""ChatGLM2, ChatGLM3 and GLM-4 in the layout of their own remote code (GLM Team 2024, arXiv:2406.12793; Du et al. 2021,
arXiv:2103.10360): RMSNorm, SwiGLU, interleaved rotary positions on half of each head, few key/value heads.

transformers has no class for this layout: fixtures are models of its `glm` re-laid-out. Not verified by one, but as
remembered from the remote code: that `rope_ratio` multiplies the base 10000 of the rotary positions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mlxlm.errors import UnsupportedModelError
from mlxlm.layers import (
    AttentionSpec,
    BlockSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    LayerNormSpec,
    NoNormSpec,
    ResidualSpec,
    RMSNormSpec,
    RotarySpec,
)
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.decoders import GATE_UP, QKV, layer_rules
from mlxlm.models.family import Family, Layout
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_rotary import write_rotary
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.heads import LanguageModelHeadSpec
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule, drop, rename, split, split_heads, tied_copy

_ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
_BODY = "transformer."


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    if hub.architecture not in ("", *_ARCHITECTURES):
        raise hub.unsupported_head(*_ARCHITECTURES)
    dim = hub.take("hidden_size", default=4096)
    eps = hub.take("layernorm_epsilon", default=1e-5)
    norm = RMSNormSpec(dim=dim, eps=eps) if hub.take("rmsnorm", default=True) else LayerNormSpec(dim=dim, eps=eps)
    bias = hub.take("add_bias_linear", default=False)
    residual = ResidualSpec(
        norm_in=norm,
        from_normed=hub.take("apply_residual_connection_post_layernorm", default=False),
        dropout=hub.take("hidden_dropout", default=0.0),
    )
    block = BlockSpec(
        attention=_parse_attention(hub, dim, bias),
        attention_residual=residual,
        feed_forward=FeedForwardSpec(
            dim=dim, hidden_dim=hub.take("ffn_hidden_size", default=13696), activation="silu", gated=True, bias=bias
        ),
        feed_forward_residual=residual,
    )
    vocab_size = hub.take("padded_vocab_size", "vocab_size", default=65024)
    tied = hub.take("tie_word_embeddings", default=False)
    hub.expect("quantization_bit", 0)
    hub.expect("pre_seq_len")
    # Fusions and precisions of 16-bit training; the division by the layer's number is undone in the softmax.
    hub.note("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "fp32_residual_connection")
    hub.note("bias_dropout_fusion", "classifier_dropout", "prefix_projection")
    # Both classes are found in configs of whole models, so the weights decide.
    headed = hub.contains("output_layer.weight", default=True) or tied
    return TransformerConfig(
        embeddings=EmbeddingsSpec(vocab_size=vocab_size, dim=dim),
        decoder=StackSpec(
            layers=(block,) * hub.take("num_layers", "num_hidden_layers", default=28),
            norm=norm if hub.take("post_layer_norm", default=True) else NoNormSpec(),
        ),
        head=LanguageModelHeadSpec(dim=dim, vocab_size=vocab_size, tied=tied) if headed else None,
        max_length=hub.take("seq_length", default=2048),
    )


def _parse_attention(hub: HubConfig, dim: int, bias: bool) -> AttentionSpec:
    heads, head_dim = hub.take("num_attention_heads", default=32), hub.take("kv_channels", default=128)
    groups = hub.take("multi_query_group_num", default=1)
    shared = hub.take("multi_query_attention", default=False)
    if shared and groups == heads > 1:
        # Its fused weight would lie in another order than that of the same attention without sharing.
        raise UnsupportedModelError(
            "config.json: multi_query_attention with as many groups as heads is not implemented"
        )
    hub.expect("original_rope", True)
    hub.expect("interleaved_qkv", False)
    return AttentionSpec(
        dim=dim,
        num_heads=heads,
        num_kv_heads=groups if shared else heads,
        head_dim=head_dim,
        causal=True,
        positions=RotarySpec(dim=head_dim // 2, base=10000.0 * hub.take("rope_ratio", default=1), layout="interleaved"),
        bias=hub.take("add_qkv_bias", default=False) or bias,
        output_bias=bias,
        dropout=hub.take("attention_dropout", default=0.0),
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block, norm = config.stack.layers[0], config.stack.layers[0].attention_residual.norm_in
    attention = block.attention
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "padded_vocab_size": config.embeddings.vocab_size,
        "hidden_size": config.dim,
        "ffn_hidden_size": block.feed_forward.hidden_dim,
        "num_layers": len(config.stack.layers),
        "num_attention_heads": attention.num_heads,
        "kv_channels": attention.head_dim,
        "multi_query_attention": attention.num_kv_heads != attention.num_heads,
        "multi_query_group_num": attention.num_kv_heads,
        "rope_ratio": attention.positions.base / 10000.0,
        "add_qkv_bias": attention.bias,
        "add_bias_linear": block.feed_forward.bias,
        "rmsnorm": isinstance(norm, RMSNormSpec),
        "layernorm_epsilon": norm.eps,
        "post_layer_norm": config.stack.norm != NoNormSpec(),
        "apply_residual_connection_post_layernorm": block.attention_residual.from_normed,
        "attention_dropout": attention.dropout,
        "hidden_dropout": block.attention_residual.dropout,
        "seq_length": config.max_length,
        "tie_word_embeddings": config.head.tied if config.head else False,
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names, as the remote code has them; the same with and without a head."""
    block = config.stack.layers[0]
    attention, hidden_dim = block.attention, block.feed_forward.hidden_dim
    wide, narrow = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    layer = _BODY + "encoder.layers.{n}."
    fused = layer + "self_attention.query_key_value.{p}"
    untied = config.head is not None and not config.head.tied
    names = {
        "self_attention.dense": "attention.output",
        "mlp.dense_4h_to_h": "feed_forward.down",
        "input_layernorm": "attention_residual.norm_in",
        "post_attention_layernorm": "feed_forward_residual.norm_in",
    }
    return (
        rename(_BODY + "embedding.word_embeddings.{p}", "embeddings.token.{p}"),
        split_heads(fused, QKV, attention.num_heads, (1, 1, 1))
        if attention.num_kv_heads == attention.num_heads
        else split(fused, QKV, (wide, narrow, narrow)),
        split(layer + "mlp.dense_h_to_4h.{p}", GATE_UP, (hidden_dim, hidden_dim)),
        *layer_rules(("",), layer, names),
        rename(_BODY + "encoder.final_layernorm.{p}", "decoder.norm.{p}"),
        rename(_BODY + "output_layer.{p}", "head.output.{p}")
        if untied
        else tied_copy(_BODY + "output_layer.{p}", "embeddings.token.{p}"),
        drop(_BODY + "rotary_pos_emb.inv_freq"),
    )


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
    keys={
        "context_length": "seq_length",
        "embedding_length": "hidden_size",
        "feed_forward_length": "ffn_hidden_size",
        "block_count": "num_layers",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "multi_query_group_num",
        "attention.key_length": "kv_channels",
        "attention.layer_norm_rms_epsilon": "layernorm_epsilon",
    },
    rules=partial(gguf_rules, joined=True, gate_up=True),
    rotary=False,
    read=_read_gguf,
    write=write_rotary,
)

FAMILY = Family(
    name="ChatGLM2 and 3",
    model_types=("chatglm",),
    parse=parse,
    unparse=unparse,
    rules=rules,
    reference="transformers, of the same weights in another layout",
    gguf=GGUF,
)
