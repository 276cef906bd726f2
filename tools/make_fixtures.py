"""Make the parity fixtures: tiny random transformers models with the outputs that transformers computes.

usage: python tools/make_fixtures.py [NAME ...]        (needs the `parity` extra; without names all are made)

Each fixture is a directory under tests/fixtures/models: a checkpoint as `save_pretrained` writes it, and
expected.safetensors with the inputs and transformers' float32 outputs in eager attention. Weights are drawn wide, norms
and biases too, so that a wrong term shows. Variants share the weights of another fixture and hold a config and outputs.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "models"
LENGTH = 19
PADDED = 11  # valid tokens of the second row
DECODED = 13  # tokens of a decoder behind an encoder


@dataclass(frozen=True)
class Case:
    """One fixture. model: a transformers class. config: its arguments. weights: the fixture whose weights it shares.

    extras: "untie": names of two modules whose weight is to be one and the same no longer.
    """

    model: str
    config: dict[str, Any]
    weights: str | None = None
    length: int = LENGTH
    attention: str = "eager"
    extras: dict[str, Any] = field(default_factory=dict)


_LLAMA = {
    "vocab_size": 67,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_FULL = {**_LLAMA, "attention_bias": True, "mlp_bias": True}


def _rope(kind: str, **parameters: Any) -> Case:
    rope = {"rope_type": kind, "rope_theta": 500.0, **parameters}
    return Case("LlamaForCausalLM", {**_LLAMA_FULL, "rope_parameters": rope}, weights="llama", length=41)


_FOUR = [1.0, 1.5, 2.0, 3.5]
_GPT2 = {"vocab_size": 61, "n_embd": 30, "n_head": 5, "n_layer": 2, "n_positions": 48, "n_inner": 44}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_BERT = {"vocab_size": 61, "hidden_size": 30, "num_attention_heads": 5, "num_hidden_layers": 2, "type_vocab_size": 3}
_BERT |= {"intermediate_size": 44, "max_position_embeddings": 48, "pad_token_id": 0, "layer_norm_eps": 1e-5}
_ROBERTA = {**_BERT, "pad_token_id": 1, "type_vocab_size": 1}
_MODERN = {"vocab_size": 61, "hidden_size": 30, "num_attention_heads": 5, "num_hidden_layers": 3, "norm_eps": 1e-4}
_MODERN |= {"intermediate_size": 44, "max_position_embeddings": 48, "local_attention": 7, "pad_token_id": 0}
_MODERN |= {"global_attn_every_n_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_MODERN |= {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
    }
}
_LABELS = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
_T5 = {"vocab_size": 53, "d_model": 20, "d_kv": 6, "d_ff": 28, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 14, "layer_norm_epsilon": 1e-4}
_T5 |= {"decoder_start_token_id": 0}
_UNTIED = {"untie": ("lm_head", "shared")}  # as published checkpoints are, whatever their config says
_GATED = {"feed_forward_proj": "gated-gelu"}
_SLIDING = {"sliding_window": 5, "use_sliding_window": True}

_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 700.0}
# The scale of scores comes from a key of its own, which is not the head's width.
_GEMMA = {**_LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 12, "rope_parameters": _DEFAULT_ROPE}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 3.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
_GEMMA3 = {**_GEMMA, "num_hidden_layers": 3, "intermediate_size": 22, "rope_parameters": _GEMMA3_ROPE}
_GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PHI = {**_LLAMA, "hidden_size": 48, "intermediate_size": 28, "vocab_size": 53}
_PHI = {key: value for key, value in _PHI.items() if key not in ("head_dim", "rms_norm_eps")}
_PHI3 = {**_PHI, "rms_norm_eps": 1e-4, "original_max_position_embeddings": 16, "sliding_window": 9}
_LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 5.0]}
_LONG |= {"rope_theta": 500.0, "partial_rotary_factor": 0.75}
_GLM = {**_LLAMA, "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5}}
_NEOX = {"vocab_size": 61, "hidden_size": 40, "num_attention_heads": 5, "num_hidden_layers": 2, **_IDS}
_NEOX |= {"intermediate_size": 44, "max_position_embeddings": 48, "layer_norm_eps": 1e-4, "hidden_act": "gelu_fast"}
_NEOX |= {"rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5}}
_FALCON = {"vocab_size": 61, "hidden_size": 40, "num_attention_heads": 5, "num_hidden_layers": 2, **_IDS}
_FALCON |= {"ffn_hidden_size": 44, "max_position_embeddings": 48, "rope_parameters": _DEFAULT_ROPE}
# Ten heads: some slopes of linear biases are no powers of two, so that their rounding shows.
_FALCON_ALIBI = {**_FALCON, "alibi": True, "bias": True, "num_attention_heads": 10}
_BLOOM = {"vocab_size": 61, "hidden_size": 30, "n_head": 5, "n_layer": 2, "layer_norm_epsilon": 1e-4, **_IDS}
_MPT = {"vocab_size": 61, "d_model": 30, "n_heads": 5, "n_layers": 2, "max_seq_len": 48, **_IDS}
_GPTJ = {**_GPT2, "n_embd": 40, "rotary_dim": 4, "pad_token_id": 0}

# Variants that a GGUF file can describe: it says nothing of windows here, of the scale of scores, of the activation.
_GGUF_CASES = {
    "qwen2-full": Case("Qwen2ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"}, weights="qwen2"),
    "gemma2-gguf": Case(
        "Gemma2ForCausalLM",
        {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
        weights="gemma2",
    ),
    "gemma3-gguf": Case(
        "Gemma3ForCausalLM",
        {**_GEMMA3, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8},
        weights="gemma3",
    ),
    "phi-plain": Case("PhiForCausalLM", {**_PHI, "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5}}),
    "gpt_neox-gelu": Case("GPTNeoXForCausalLM", {**_NEOX, "hidden_act": "gelu"}, weights="gpt_neox"),
}

CASES: dict[str, Case] = {
    **_GGUF_CASES,
    "llama": Case("LlamaForCausalLM", {**_LLAMA_FULL, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-tied": Case("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-headless": Case("LlamaModel", {**_LLAMA, "num_key_value_heads": 1}),
    "llama-linear": _rope("linear", factor=3.0),
    "llama-dynamic": Case(
        "LlamaForCausalLM",
        {
            **_LLAMA_FULL,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
        },
        weights="llama",
        length=41,
    ),
    "llama-yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "llama-yarn-mscale": _rope(
        "yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        mscale=0.8,
        mscale_all_dim=0.3,
        beta_fast=8.0,
        beta_slow=2.0,
        truncate=False,
    ),
    "llama-longrope-short": Case(
        "LlamaForCausalLM",
        {
            **_LLAMA_FULL,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "short_factor": _FOUR,
                "long_factor": [2.0, 3.0, 4.0, 9.0],
                "factor": 4.0,
                "original_max_position_embeddings": 48,
            },
        },
        weights="llama",
        length=41,
    ),
    "llama-longrope-long": _rope(
        "longrope",
        short_factor=_FOUR,
        long_factor=[2.0, 3.0, 4.0, 9.0],
        factor=4.0,
        original_max_position_embeddings=16,
    ),
    "llama-wavelength": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "llama-proportional": _rope("proportional", partial_rotary_factor=0.5, factor=2.0),
    "mistral": Case("MistralForCausalLM", {**_LLAMA, "sliding_window": 5}),
    "qwen2": Case(
        "Qwen2ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"} | _SLIDING | {"max_window_layers": 1}
    ),
    "qwen3": Case("Qwen3ForCausalLM", {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gpt2": Case("GPT2LMHeadModel", _GPT2),
    "gpt2-scaled": Case("GPT2LMHeadModel", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}, weights="gpt2"),
    "gpt2-headless": Case("GPT2Model", {**_GPT2, "activation_function": "relu"}),
    "gemma": Case(
        "GemmaForCausalLM",
        {**_LLAMA, "attention_bias": True, "num_key_value_heads": 1, "rope_parameters": _DEFAULT_ROPE},
    ),
    "gemma2": Case("Gemma2ForCausalLM", {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": Case("Gemma3ForCausalLM", {**_GEMMA3, "final_logit_softcapping": 4.0}),
    "gemma3-headless": Case("Gemma3TextModel", _GEMMA3),
    "phi": Case(
        "PhiForCausalLM",
        {**_PHI, "qk_layernorm": True, "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
    ),
    "phi3": Case("Phi3ForCausalLM", {**_PHI3, "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.75}}),
    "phi3-longrope": Case("Phi3ForCausalLM", {**_PHI3, "rope_parameters": _LONG}, weights="phi3"),
    "glm": Case("GlmForCausalLM", _GLM),
    "glm4": Case("Glm4ForCausalLM", _GLM),
    "chatglm": Case("GlmForCausalLM", _GLM, extras={"layout": "chatglm"}),
    "gpt_neox": Case("GPTNeoXForCausalLM", _NEOX),
    "gpt_neox-sequential": Case("GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}, weights="gpt_neox"),
    "gpt_neox-tokens": Case("GPTNeoXForTokenClassification", {**_NEOX, **_LABELS}),
    "gemma3-sequence": Case("Gemma3TextForSequenceClassification", {**_GEMMA3, **_LABELS}),
    "bloom-sequence": Case("BloomForSequenceClassification", {**_BLOOM, **_LABELS}),
    "falcon": Case("FalconForCausalLM", _FALCON),
    "falcon-grouped": Case(
        "FalconForCausalLM",
        {**_FALCON, "hidden_size": 36, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon-sequential": Case(
        "FalconForCausalLM", {**_FALCON, "parallel_attn": False, "multi_query": False, "bias": True}
    ),
    # Eager attention of transformers 5.23 adds the biases twice: in the mask, and to the scores.
    "falcon-alibi": Case("FalconForCausalLM", _FALCON_ALIBI, attention="sdpa"),
    "bloom": Case("BloomForCausalLM", _BLOOM),
    "bloom-normed-residual": Case(
        "BloomForCausalLM", {**_BLOOM, "apply_residual_connection_post_layernorm": True}, weights="bloom"
    ),
    "mpt": Case("MptForCausalLM", _MPT),
    "mpt-clipped": Case(
        "MptForCausalLM",
        {**_MPT, "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.9}},
        weights="mpt",
    ),
    "gptj": Case("GPTJForCausalLM", _GPTJ),
    "gpt_bigcode": Case("GPTBigCodeForCausalLM", _GPT2),
    "gpt_bigcode-multihead": Case("GPTBigCodeForCausalLM", {**_GPT2, "multi_query": False}),
    "bert": Case("BertForMaskedLM", _BERT),
    "bert-pooled": Case("BertModel", {**_BERT, "hidden_act": "gelu_new"}),
    "bert-pretraining": Case("BertForPreTraining", _BERT),
    "bert-sequence": Case("BertForSequenceClassification", {**_BERT, **_LABELS}),
    "bert-tokens": Case("BertForTokenClassification", {**_BERT, **_LABELS}),
    "bert-span": Case("BertForQuestionAnswering", _BERT),
    "roberta": Case("RobertaForMaskedLM", _ROBERTA),
    "roberta-pooled": Case("RobertaModel", {**_ROBERTA, "pad_token_id": 0}),
    "roberta-sequence": Case("RobertaForSequenceClassification", {**_ROBERTA, **_LABELS}),
    "roberta-tokens": Case("RobertaForTokenClassification", _ROBERTA),
    "roberta-span": Case("RobertaForQuestionAnswering", _ROBERTA),
    "modernbert": Case("ModernBertForMaskedLM", _MODERN),
    "modernbert-biased": Case(
        "ModernBertForMaskedLM",
        {
            **_MODERN,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "decoder_bias": False,
            "classifier_activation": "silu",
            "num_hidden_layers": 2,
        },
    ),
    "modernbert-headless": Case("ModernBertModel", {**_MODERN, "layer_types": None, "num_hidden_layers": 2}),
    "modernbert-sequence": Case(
        "ModernBertForSequenceClassification",
        {**_MODERN, **_LABELS, "classifier_pooling": "mean", "num_hidden_layers": 2},
    ),
    "modernbert-tokens": Case("ModernBertForTokenClassification", {**_MODERN, **_LABELS, "num_hidden_layers": 2}),
    "llama-sequence": Case("LlamaForSequenceClassification", {**_LLAMA, **_LABELS}),
    "llama-tokens": Case("LlamaForTokenClassification", {**_LLAMA, "num_labels": 5}),
    "gpt2-sequence": Case("GPT2ForSequenceClassification", {**_GPT2, "pad_token_id": 0, "num_labels": 1}),
    "gpt2-tokens": Case("GPT2ForTokenClassification", {**_GPT2, **_LABELS}),
    "llama-span": Case("LlamaForQuestionAnswering", _LLAMA),
    "qwen2-span": Case("Qwen2ForQuestionAnswering", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "qwen3-span": Case("Qwen3ForQuestionAnswering", _LLAMA),
    "gpt2-span": Case("GPT2ForQuestionAnswering", _GPT2),
    "gpt_neox-span": Case("GPTNeoXForQuestionAnswering", _NEOX),
    "falcon-span": Case("FalconForQuestionAnswering", _FALCON),
    "bloom-span": Case("BloomForQuestionAnswering", _BLOOM),
    "mpt-span": Case("MptForQuestionAnswering", _MPT),
    "t5-tokens": Case("T5ForTokenClassification", {**_T5, **_LABELS}),
    "t5-sequence": Case("T5ForSequenceClassification", {**_T5, **_LABELS, "eos_token_id": 2}),
    "t5-span": Case("T5ForQuestionAnswering", {**_T5, **_GATED}),
    "mt5-sequence": Case("MT5ForSequenceClassification", {**_T5, **_GATED, **_LABELS, "eos_token_id": 2}),
    "umt5-span": Case("UMT5ForQuestionAnswering", _T5),
    "qwen3-sequence": Case("Qwen3ForSequenceClassification", {**_LLAMA, **_LABELS}),
    "t5": Case("T5ForConditionalGeneration", _T5),
    "t5-gated": Case("T5ForConditionalGeneration", {**_T5, **_GATED, "tie_word_embeddings": False}, extras=_UNTIED),
    "t5-headless": Case("T5Model", {**_T5, "decoder_start_token_id": 3}),
    "t5-encoder": Case("T5EncoderModel", _T5),
    "mt5": Case("MT5ForConditionalGeneration", {**_T5, **_GATED}, extras=_UNTIED),
    "umt5": Case("UMT5ForConditionalGeneration", {**_T5, **_GATED}),
}


def build(case: Case, name: str) -> torch.nn.Module:
    """The model of a case with its weights drawn wide."""
    model_class = getattr(transformers, case.model)
    config = model_class.config_class(**case.config)
    config._attn_implementation = case.attention
    torch.manual_seed(sum(map(ord, case.weights or name)))
    model = model_class(config).eval().float()
    if "untie" in case.extras:
        own, other = (model.get_submodule(module) for module in case.extras["untie"])
        own.weight = torch.nn.Parameter(other.weight.detach().clone())
        model.all_tied_weights_keys = {}
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.25)
            elif key.endswith("bias"):
                weight.normal_(0, 0.2)
            else:
                weight.normal_(1, 0.3)
    return model


def expected(model: torch.nn.Module, case: Case) -> dict[str, np.ndarray]:
    """Inputs of two rows, the second padded on the right, and what the model makes of them."""
    config = model.config
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, config.vocab_size, (2, case.length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, PADDED:] = 0
    if case.model.endswith("ForSequenceClassification") and config.pad_token_id is not None:
        tokens[1, PADDED:] = config.pad_token_id  # decoders look for the last token that is none
    two_stacks = hasattr(model, "get_decoder") and config.is_encoder_decoder
    if two_stacks and case.model.endswith("ForSequenceClassification"):
        tokens[0, -1] = tokens[1, PADDED - 1] = config.eos_token_id  # where the head looks
    inputs = {"input_ids": tokens, "attention_mask": mask}
    result = {"tokens": tokens.numpy().astype(np.int32), "lengths": np.array([case.length, PADDED], np.int32)}
    if getattr(config, "type_vocab_size", 0):
        types = torch.randint(0, config.type_vocab_size, tokens.shape, generator=generator)
        inputs["token_type_ids"] = types
        result["token_types"] = types.numpy().astype(np.int32)
    if two_stacks and not case.model.endswith(("ForSequenceClassification", "ForQuestionAnswering")):
        # Teacher forcing: the decoder reads other tokens, and no padding, since it looks back only.
        inputs["decoder_input_ids"] = torch.randint(3, config.vocab_size, (2, DECODED), generator=generator)
        inputs["decoder_input_ids"][:, 0] = config.decoder_start_token_id
        result["decoder_tokens"] = inputs["decoder_input_ids"].numpy().astype(np.int32)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    for ours, theirs in {
        "logits": "logits",
        "prediction_logits": "prediction_logits",
        "pooled": "pooler_output",
        "next_sentence": "seq_relationship_logits",
    }.items():
        if getattr(output, theirs, None) is not None:
            result["logits" if ours == "prediction_logits" else ours] = getattr(output, theirs).numpy()
    if hasattr(output, "start_logits"):
        result["logits"] = torch.stack([output.start_logits, output.end_logits], dim=-1).numpy()
    hidden = getattr(output, "last_hidden_state", None)
    states = "decoder_hidden_states" if two_stacks else "hidden_states"
    result["hidden"] = (getattr(output, states)[-1] if hidden is None else hidden).numpy()
    if "decoder_tokens" in result:
        result["memory"] = output.encoder_last_hidden_state.numpy()
    return {key: np.ascontiguousarray(value) for key, value in result.items()}


def lay_out_as_chatglm(target: Path) -> None:
    """Rewrite a `glm` checkpoint as its model's own remote code names, fuses and configures it."""
    values = json.loads((target / "config.json").read_text())
    old = load_file(target / "model.safetensors")
    new = {
        "transformer.embedding.word_embeddings.weight": old.pop("model.embed_tokens.weight"),
        "transformer.encoder.final_layernorm.weight": old.pop("model.norm.weight"),
        "transformer.output_layer.weight": old.pop("lm_head.weight"),
    }
    for n in range(values["num_hidden_layers"]):
        source, layer = f"model.layers.{n}.", f"transformer.encoder.layers.{n}."
        for kind in ("weight", "bias"):
            parts = [old.pop(f"{source}self_attn.{part}_proj.{kind}") for part in "qkv"]
            new[f"{layer}self_attention.query_key_value.{kind}"] = np.concatenate(parts)
        for ours, theirs in {
            "self_attention.dense": "self_attn.o_proj",
            "mlp.dense_h_to_4h": "mlp.gate_up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
        }.items():
            new[f"{layer}{ours}.weight"] = old.pop(f"{source}{theirs}.weight")
    assert not old, old.keys()
    save_file(new, target / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": values["intermediate_size"],
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": values["hidden_size"],
        "kv_channels": values["head_dim"],
        "layernorm_epsilon": values["rms_norm_eps"],
        "multi_query_attention": True,
        "multi_query_group_num": values["num_key_value_heads"],
        "num_attention_heads": values["num_attention_heads"],
        "num_layers": values["num_hidden_layers"],
        "original_rope": True,
        "padded_vocab_size": values["vocab_size"],
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": values["rope_parameters"]["rope_theta"] / 10000.0,
        "seq_length": values["max_position_embeddings"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make(name: str) -> None:
    """Write one fixture, replacing what was there."""
    case = CASES[name]
    model = build(case, name)
    target = FIXTURES / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if case.weights is None:
        model.save_pretrained(target)
    else:
        model.config.save_pretrained(target)
        values = json.loads((target / "config.json").read_text())
        values["architectures"] = [case.model]
        (target / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        (target / "weights-of").write_text(case.weights + "\n")
    (target / "generation_config.json").unlink(missing_ok=True)
    if case.extras.get("layout") == "chatglm":
        lay_out_as_chatglm(target)
    save_file(expected(model, case), target / "expected.safetensors")
    print(f"{name}: {sum(file.stat().st_size for file in target.iterdir()) // 1024} KB")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        make(wanted)
