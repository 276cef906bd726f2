"""ChatGLM2, ChatGLM3 and GLM-4 in the layout of their own remote code (GLM Team 2024, arXiv:2406.12793; Du et al. 2021,
arXiv:2103.10360): RMSNorm, SwiGLU, interleaved rotary positions on half of each head, few key/value heads.

transformers has no class for this layout: fixtures are models of its `glm` re-laid-out. Not verified by one, but as
remembered from the remote code: that `rope_ratio` multiplies the base 10000 of the rotary positions.
"""

from __future__ import annotations

from typing import Any

from mlxlm.errors import UnsupportedModelError
from mlxlm.layers import BlockSpec, EmbeddingsSpec, LayerNormSpec, NoNormSpec, NormSpec, RMSNormSpec, RotarySpec
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.decoders import GATE_UP, layer_rules
from mlxlm.models.families.chatglm_gguf import GGUF
from mlxlm.models.family import Family, Layout
from mlxlm.models.heads import LanguageModelHeadSpec
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.plain_decoders import fused_by_group, fused_in_turn, plain_block
from mlxlm.models.weights import Rule, drop, rename, split, tied_copy

_ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
_BODY = "transformer."


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    if hub.architecture not in ("", *_ARCHITECTURES):
        raise hub.unsupported_head(*_ARCHITECTURES)
    dim = hub.take("hidden_size", default=4096)
    eps = hub.take("layernorm_epsilon", default=1e-5)
    norm = RMSNormSpec(dim=dim, eps=eps) if hub.take("rmsnorm", default=True) else LayerNormSpec(dim=dim, eps=eps)
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
            layers=(_parse_block(hub, norm),) * hub.take("num_layers", "num_hidden_layers", default=28),
            norm=norm if hub.take("post_layer_norm", default=True) else NoNormSpec(),
        ),
        head=LanguageModelHeadSpec(dim=dim, vocab_size=vocab_size, tied=tied) if headed else None,
        max_length=hub.take("seq_length", default=2048),
    )


def _parse_block(hub: HubConfig, norm: NormSpec) -> BlockSpec:
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
    bias = hub.take("add_bias_linear", default=False)
    return plain_block(
        norm,
        heads=heads,
        kv_heads=groups if shared else heads,
        head_dim=head_dim,
        hidden_dim=hub.take("ffn_hidden_size", default=13696),
        activation="silu",
        gated=True,
        from_normed=hub.take("apply_residual_connection_post_layernorm", default=False),
        dropout=hub.take("hidden_dropout", default=0.0),
        attention_dropout=hub.take("attention_dropout", default=0.0),
        positions=RotarySpec(dim=head_dim // 2, base=10000.0 * hub.take("rope_ratio", default=1), layout="interleaved"),
        bias=bias,
        fused_bias=hub.take("add_qkv_bias", default=False) or bias,
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
        (fused_by_group if attention.num_kv_heads == attention.num_heads else fused_in_turn)(fused, attention),
        split(layer + "mlp.dense_h_to_4h.{p}", GATE_UP, (hidden_dim, hidden_dim)),
        *layer_rules(("",), layer, names),
        rename(_BODY + "encoder.final_layernorm.{p}", "decoder.norm.{p}"),
        rename(_BODY + "output_layer.{p}", "head.output.{p}")
        if untied
        else tied_copy(_BODY + "output_layer.{p}", "embeddings.token.{p}"),
        drop(_BODY + "rotary_pos_emb.inv_freq"),
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
