"""GPT-BigCode: SantaCoder and StarCoder (Li et al. 2023, arXiv:2305.06161): GPT-2 with one key/value head for all."""

from __future__ import annotations

from functools import partial
from typing import Any

from mlxlm.layers import EmbeddingsSpec, LayerNormSpec, LearnedPositionsSpec
from mlxlm.models.config import TransformerConfig
from mlxlm.models.decoders import assemble, layer_rules, outer_keys, outer_rules, prefixes
from mlxlm.models.families.gpt2 import GGUF_KEYS
from mlxlm.models.family import Family, Layout
from mlxlm.models.gguf_dialect import GgufDialect, GgufHeader
from mlxlm.models.gguf_weights import gguf_rules
from mlxlm.models.hub_config import HubConfig, hub_activation
from mlxlm.models.plain_decoders import fused_by_group, fused_in_turn, plain_block
from mlxlm.models.weights import Rule, drop, rename, under

_CLASSES = ("GPTBigCodeModel", "GPTBigCodeForCausalLM")


def parse(hub: HubConfig) -> TransformerConfig:
    """config.json -> configuration."""
    dim = hub.take("n_embd", "hidden_size", default=768)
    heads = hub.take("n_head", "num_attention_heads", default=12)
    norm = LayerNormSpec(dim=dim, eps=hub.take("layer_norm_epsilon", default=1e-5))
    block = plain_block(
        norm,
        heads=heads,
        kv_heads=1 if hub.take("multi_query", default=True) else heads,
        hidden_dim=hub.take("n_inner", default=4 * dim),
        activation=hub.activation("activation_function", default="gelu_pytorch_tanh"),
        bias=True,
        dropout=hub.take("resid_pdrop", default=0.1),
        attention_dropout=hub.take("attn_pdrop", default=0.1),
        scale=None if hub.take("scale_attn_weights", default=True) else 1.0,
    )
    hub.expect("add_cross_attention", False)
    # Precision of 16-bit attention (ours accumulates in float32 anyway), and how one server ran the model.
    hub.note("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "num_key_value_heads")
    hub.note("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache")
    hub.note("validate_runner_input", "summary_activation", "summary_first_dropout", "summary_proj_to_labels")
    hub.note("summary_type", "summary_use_proj")
    num_positions = hub.take("n_positions", "max_position_embeddings", default=1024)
    return assemble(
        hub,
        classes=_CLASSES,
        embeddings=EmbeddingsSpec(
            vocab_size=hub.take("vocab_size"),
            dim=dim,
            positions=LearnedPositionsSpec(num_positions=num_positions, dim=dim),
            dropout=hub.take("embd_pdrop", default=0.1),
        ),
        layers=(block,) * hub.take("n_layer", "num_hidden_layers", default=12),
        norm=norm,
        tied=True,
        max_length=num_positions,
    )


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    block = config.stack.layers[0]
    return {
        **outer_keys(config, "gpt_bigcode", _CLASSES),
        "n_embd": config.dim,
        "n_head": block.attention.num_heads,
        "n_layer": len(config.stack.layers),
        "n_inner": block.feed_forward.hidden_dim,
        "n_positions": config.max_length,
        "multi_query": block.attention.num_kv_heads == 1,
        "scale_attn_weights": block.attention.scale is None,
        "activation_function": hub_activation(block.feed_forward.activation),
        "layer_norm_epsilon": config.stack.norm.eps,
        "attn_pdrop": block.attention.dropout,
        "resid_pdrop": block.attention_residual.dropout,
        "embd_pdrop": config.embeddings.dropout,
    }


def rules(config: TransformerConfig, layout: Layout = "hub") -> tuple[Rule, ...]:
    """Weight names. Query, key and value are one tensor: one after another with a shared head, else head by head."""
    where, attention = prefixes(config, "transformer."), config.stack.layers[0].attention
    fused = under(where, "h.{n}.attn.c_attn.{p}")
    names = {
        "attn.c_proj": "attention.output",
        "mlp.c_fc": "feed_forward.up",
        "mlp.c_proj": "feed_forward.down",
        "ln_1": "attention_residual.norm_in",
        "ln_2": "feed_forward_residual.norm_in",
    }
    return (
        *outer_rules(config, where, token="wte", norm="ln_f", tokens_head="classifier"),
        rename(under(where, "wpe.{p}"), "embeddings.position.{p}"),
        fused_in_turn(fused, attention) if attention.num_kv_heads == 1 else fused_by_group(fused, attention),
        *layer_rules(where, "h.{n}.", names),
        drop(*under(where, "h.{n}.attn.bias", "h.{n}.attn.masked_bias")),  # buffers of older versions
    )


def _read_gguf(header: GgufHeader, values: dict[str, Any]) -> None:
    values["multi_query"] = header.peek("attention.head_count_kv", 1) == 1
    header.expect("attention.head_count_kv", 1, values["n_head"])


GGUF = GgufDialect(
    architecture="starcoder",
    model_type="gpt_bigcode",
    keys=GGUF_KEYS,
    rules=partial(gguf_rules, joined=True),
    rotary=False,
    read=_read_gguf,
    write=lambda config: {"attention.head_count_kv": config.stack.layers[0].attention.num_kv_heads},
)

FAMILY = Family(name="GPT-BigCode", model_types=("gpt_bigcode",), parse=parse, unparse=unparse, rules=rules, gguf=GGUF)
