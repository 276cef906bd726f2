"""Make the adapter fixtures: small random adapters as Hugging Face PEFT writes them, with the logits it computes.

usage: python tools/make_peft_fixtures.py [NAME ...]        (needs the `parity` extra; without names all are made)

Each fixture is a directory under tests/fixtures/peft: the adapter's files and expected.safetensors with tokens and
float32 logits, for a base under tests/fixtures/models. Weights are drawn wide, so that a wrong term shows.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import peft
import torch
import transformers
from adapter_cases import (
    FIXTURES,
    Case,
    base_values,
    inputs_for,
    make_named,
    name_base,
    seed_of,
    write_expected,
)

_LORA = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1}
CASES = {
    "lora-rotary": Case(
        "llama",
        "LoraConfig",
        {
            **_LORA,
            "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
            "rank_pattern": {"v_proj": 5},
            "alpha_pattern": {"layers.1.mlp.down_proj": 11},
            "modules_to_save": ["lm_head"],
        },
    ),
    "lora-stabilized": Case("llama", "LoraConfig", {**_LORA, "target_modules": ["o_proj"], "use_rslora": True}),
    "lora-conv1d": Case("gpt2", "LoraConfig", {**_LORA, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "dora-conv1d": Case(
        "gpt2", "LoraConfig", {**_LORA, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}
    ),
    "dora-rotary": Case("llama", "LoraConfig", {**_LORA, "target_modules": ["k_proj", "up_proj"], "use_dora": True}),
    "dora-table": Case(
        "llama", "LoraConfig", {**_LORA, "target_modules": ["embed_tokens", "v_proj"], "use_dora": True}
    ),
    "lora-fused": Case("phi3", "LoraConfig", {**_LORA, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "lora-fused-heads": Case(
        "gpt_neox", "LoraConfig", {**_LORA, "target_modules": ["query_key_value"], "layers_to_transform": [1]}
    ),
    "lora-fused-groups": Case("falcon-grouped", "LoraConfig", {**_LORA, "target_modules": ["query_key_value"]}),
    "lora-encoder": Case(
        "bert-sequence", "LoraConfig", {**_LORA, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    ),
    "lora-tokens": Case(
        "bert-tokens", "LoraConfig", {**_LORA, "target_modules": ["query", "dense"], "task_type": "TOKEN_CLS"}
    ),
    "lora-pooled-last": Case(
        "llama-sequence", "LoraConfig", {**_LORA, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
    ),
    "lora-seq2seq": Case("t5", "LoraConfig", {**_LORA, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "ia3-rotary": Case(
        "llama",
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "ia3-seq2seq": Case("t5", "IA3Config", {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}),
    "ia3-encoder": Case(
        "bert-sequence",
        "IA3Config",
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
            "task_type": "SEQ_CLS",
        },
    ),
    "ia3-conv1d": Case(
        "gpt2",
        "IA3Config",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "prompt-rotary": Case("llama", "PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    "prompt-scaled": Case("gemma2", "PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    "prompt-learned": Case("gpt2", "PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    "prompt-encoder": Case("bert-sequence", "PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "SEQ_CLS"}),
    "prompt-seq2seq": Case("t5", "PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "SEQ_2_SEQ_LM"}),
    "p-tuning-rotary": Case(
        "llama", "PromptEncoderConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", "encoder_hidden_size": 12}
    ),
    "p-tuning-recurrent": Case(
        "llama",
        "PromptEncoderConfig",
        {
            "num_virtual_tokens": 3,
            "task_type": "CAUSAL_LM",
            "encoder_hidden_size": 6,
            "encoder_reparameterization_type": "LSTM",
        },
    ),
    "prefix-rotary": Case("llama", "PrefixTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    "prefix-projected": Case(
        "llama",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "prefix-learned": Case("gpt2", "PrefixTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    "prefix-alibi": Case("bloom", "PrefixTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    "prefix-window": Case("mistral", "PrefixTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    # By itself PEFT takes the width of the model for that of all heads, and the number of the encoder's layers.
    "prefix-seq2seq": Case(
        "t5",
        "PrefixTuningConfig",
        {
            "num_virtual_tokens": 4,
            "task_type": "SEQ_2_SEQ_LM",
            "token_dim": 18,
            "num_attention_heads": 3,
            "num_layers": 3,
        },
    ),
    "prefix-encoder": Case("bert-sequence", "PrefixTuningConfig", {"num_virtual_tokens": 4, "task_type": "SEQ_CLS"}),
}


def base_model(name: str) -> Any:
    """The transformers model of a base, in eager attention."""
    folder, values = base_values(name)
    kind = getattr(transformers, values["architectures"][0])
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make(name: str, case: Case) -> None:
    """Write one fixture."""
    rng = np.random.default_rng(seed_of(name))
    base = base_model(case.base)
    model = peft.get_peft_model(base, getattr(peft, case.config)(**case.settings)).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wide = 0.7 if "prompt" in parameter_name else 0.3
            parameter.data += wide * torch.randn_like(parameter)
    folder = FIXTURES / "peft" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    name_base(folder, base_model_name_or_path=case.base)
    again = peft.PeftModel.from_pretrained(base_model(case.base), folder).eval()
    write_expected(folder, inputs_for(base, rng), again)


if __name__ == "__main__":
    make_named(make, CASES)
