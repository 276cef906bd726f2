"""adapter_config.json of Hugging Face PEFT: which keys count, which have no effect, which can't be served."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlxlm.errors import ConfigError, listing

if TYPE_CHECKING:
    from mlxlm.models import Transformer

_ALWAYS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save",
}  # fmt: skip
_TARGETS = {"target_modules", "exclude_modules", "fan_in_fan_out"}
_VIRTUAL = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}

# By peft_type: keys that are read, and keys that say how training began or ran and don't change the result.
KEYS: dict[str, set[str]] = {
    "LORA": {
        "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
        "layers_to_transform", "layers_pattern", "init_lora_weights", "megatron_config", "megatron_core",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
        *_TARGETS,
    },
    "IA3": {"feedforward_modules", "init_ia3_weights", *_TARGETS},
    "PROMPT_TUNING": {
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", *_VIRTUAL,
    },
    "P_TUNING": {
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout", *_VIRTUAL,
    },
    "PREFIX_TUNING": {"encoder_hidden_size", "prefix_projection", "init_weights", *_VIRTUAL},
}  # fmt: skip
# Ways to begin that leave the base weights alone; the others take something out of them first.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def check_keys(values: Mapping[str, Any]) -> str:
    """The peft_type of a config. Raises ConfigError for a type or a setting that is not implemented, naming all."""
    kind = values.get("peft_type")
    if kind not in KEYS:
        raise ConfigError(f"adapter_config.json: peft_type {kind!r} is not implemented; read are {', '.join(KEYS)}")
    known = KEYS[kind] | _ALWAYS
    foreign = [f"{key} = {value!r}" for key, value in values.items() if key not in known and value]
    if foreign:
        raise ConfigError(
            f"adapter_config.json: settings that may change the result and are not implemented: {listing(foreign)}"
        )
    init = values.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise ConfigError(
            f"adapter_config.json: init_lora_weights = {init!r} changes the base weights; convert the adapter to plain "
            "LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return kind


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module's name, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def task_type(model: Transformer) -> str | None:
    """PEFT's name of what a model does."""
    config = model.config
    if config.head is None:
        return "FEATURE_EXTRACTION"
    if config.predicts_words:
        return "SEQ_2_SEQ_LM" if config.has_memory else "CAUSAL_LM" if config.decoder is not None else None
    kinds = {"SequenceHeadSpec": "SEQ_CLS", "TokenHeadSpec": "TOKEN_CLS", "SpanHeadSpec": "QUESTION_ANS"}
    return kinds[type(config.head).__name__]


def common_values(model: Transformer, peft_type: str) -> dict[str, Any]:
    """What every config says."""
    source = getattr(model, "source", None)
    return {
        "peft_type": peft_type,
        "task_type": task_type(model),
        "base_model_name_or_path": None if source is None else str(source.path),
        "inference_mode": True,
    }
