"""GLM (Du et al. 2021, arXiv:2103.10360), the blank-filling model: pre-LayerNorm, biases everywhere, tanh-GELU, tied
head, and learned positions in two coordinates. The text is seen by all, what fills its blanks only by what comes later.
"""

from __future__ import annotations

from typing import Any

from mlxlm.layers import (
    AttentionSpec,
    BlockPositionsSpec,
    BlockSpec,
    EmbeddingsSpec,
    FeedForwardSpec,
    LayerNormSpec,
    ResidualSpec,
)
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.family import Family, Layout
from mlxlm.models.heads import LanguageModelHeadSpec
from mlxlm.models.hub_config import HubConfig
from mlxlm.models.weights import Rule, rename, split, under

_CLASSES = ("GLMModel", "GLMForConditionalGeneration")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration. All checkpoints have a head; "output_predict" says whether a class uses it."""
    if hub.architecture not in ("", *_CLASSES):
        raise hub.unsupported_head(*_CLASSES)
    dim, heads = hub.take("hidden_size", default=1024), hub.take("num_attention_heads", default=16)
    positions = hub.take("max_sequence_length", default=512)
    vocab_size = hub.take("vocab_size", default=30592)
    norm = LayerNormSpec(dim=dim, eps=hub.take("layernorm_epsilon", default=1e-5))
    residual = ResidualSpec(norm_in=norm, dropout=hub.take("output_dropout_prob", default=0.1))
    block = BlockSpec(
        attention=AttentionSpec(
            dim=dim,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=dim // heads,
            causal=True,
            bias=True,
            output_bias=True,
            dropout=hub.take("attention_dropout_prob", default=0.1),
        ),
        attention_residual=residual,
        feed_forward=FeedForwardSpec(dim=dim, hidden_dim=4 * dim, activation="gelu_tanh", bias=True),
        feed_forward_residual=residual,
    )
    hub.expect("block_position_encoding", True)
    hub.expect("relative_encoding", False)
    hub.expect("spell_length")
    hub.note("attention_scale")  # divides and multiplies the scores, against overflow in float16
    hub.note("output_predict", "parallel_output", "checkpoint_activations", "checkpoint_num_layers")
    hub.note("pool_token", "spell_func", "max_memory_length")
    return TransformerConfig(
        embeddings=EmbeddingsSpec(
            vocab_size=vocab_size,
            dim=dim,
            positions=BlockPositionsSpec(num_positions=positions + 1, dim=dim),
            dropout=hub.take("embedding_dropout_prob", default=0.1),
        ),
        decoder=StackSpec(layers=(block,) * hub.take("num_layers", default=24), norm=norm),
        head=LanguageModelHeadSpec(dim=dim, vocab_size=vocab_size, tied=True),
        max_length=positions,
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    return {
        "architectures": ["GLMModel"],
        "model_type": "glm",
        "block_position_encoding": True,
        "output_predict": True,
        "vocab_size": config.embeddings.vocab_size,
        "hidden_size": config.dim,
        "num_layers": len(config.stack.layers),
        "num_attention_heads": block.attention.num_heads,
        "max_sequence_length": config.max_length,
        "layernorm_epsilon": config.stack.norm.eps,
        "embedding_dropout_prob": config.embeddings.dropout,
        "attention_dropout_prob": block.attention.dropout,
        "output_dropout_prob": block.attention_residual.dropout,
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names."""
    prefixes, layer, dim = ("", "glm."), "decoder.layers.{n}.", config.dim
    hub = "transformer.layers.{n}."
    names = {
        "attention.dense.{p}": "attention.output.{p}",
        "mlp.dense_h_to_4h.{p}": "feed_forward.up.{p}",
        "mlp.dense_4h_to_h.{p}": "feed_forward.down.{p}",
        "input_layernorm.{p}": "attention_residual.norm_in.{p}",
        "post_attention_layernorm.{p}": "feed_forward_residual.norm_in.{p}",
    }
    return (
        rename(under(prefixes, "word_embeddings.{p}"), "embeddings.token.{p}"),
        rename(under(prefixes, "transformer.position_embeddings.{p}"), "embeddings.position.text.{p}"),
        rename(under(prefixes, "transformer.block_position_embeddings.{p}"), "embeddings.position.block.{p}"),
        split(
            under(prefixes, hub + "attention.query_key_value.{p}"),
            tuple(layer + f"attention.{part}.{{p}}" for part in ("query", "key", "value")),
            (dim, dim, dim),
        ),
        *(rename(under(prefixes, hub + theirs), layer + ours) for theirs, ours in names.items()),
        rename(under(prefixes, "transformer.final_layernorm.{p}"), "decoder.norm.{p}"),
    )


FAMILY = Family(
    name="GLM (original)",
    model_types=("glm",),
    parse=parse,
    unparse=unparse,
    rules=rules,
    reference="a forward pass in numpy",
)
