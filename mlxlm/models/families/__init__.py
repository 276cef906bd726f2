"""The families: one small file each, found by the `model_type` of a config.json.

A file defines `FAMILY`. It parses and unparses the hub's config and lists the weight names; it defines no module.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mlxlm.errors import ModelNotFoundError, UnsupportedModelError, nearest
from mlxlm.models.family import Family

# model_type in config.json -> file in this folder. A table, so that one family is imported and not all.
_FILES = {
    "bert": "bert",
    "bloom": "bloom",
    "chatglm": "chatglm",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "glm": "glm",
    "glm4": "glm4",
    "glm_original": "glm_original",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "gpt_neox": "gpt_neox",
    "gptj": "gptj",
    "llama": "llama",
    "mistral": "mistral",
    "modernbert": "modernbert",
    "mpt": "mpt",
    "mt5": "mt5",
    "palm": "palm",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "roberta": "roberta",
    "t5": "t5",
    "umt5": "umt5",
}

# Two families with one model_type: the key that only the configs of the second have.
_VARIANTS = {"glm": ("block_position_encoding", "glm_original")}

# general.architecture in a GGUF file -> file in this folder.
_GGUF_FILES = {
    "bert": "bert",
    "bloom": "bloom",
    "chatglm": "chatglm",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gptneox": "gpt_neox",
    "llama": "llama",
    "mpt": "mpt",
    "phi2": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "starcoder": "gpt_bigcode",
}


def model_types() -> tuple[str, ...]:
    """Every supported `model_type`, and the names of families that share another's."""
    return tuple(sorted(_FILES))


def families() -> tuple[Family, ...]:
    """All families, by name."""
    return tuple(sorted(map(_load, set(_FILES.values())), key=lambda one: one.name.lower()))


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises UnsupportedModelError that names the nearest supported ones."""
    if model_type not in _FILES:
        raise UnsupportedModelError(f"this architecture is not supported: {model_type!r}{nearest(model_type, _FILES)}")
    return _load(_FILES[model_type])


def family_of(values: dict[str, Any]) -> Family:
    """The family of a config.json. Raises ModelNotFoundError when it has no `model_type`."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ModelNotFoundError("config.json has no model_type, so it does not say what model this is")
    key, variant = _VARIANTS.get(model_type, ("", model_type))
    return family(variant if key in values else model_type)


def gguf_family(architecture: str) -> Family:
    """The family of a GGUF file's `general.architecture`. Raises UnsupportedModelError."""
    if architecture not in _GGUF_FILES:
        raise UnsupportedModelError(
            f"GGUF files of architecture {architecture!r} are not supported{nearest(architecture, _GGUF_FILES)}"
        )
    return _load(_GGUF_FILES[architecture])


def _load(file: str) -> Family:
    return import_module(f"mlxlm.models.families.{file}").FAMILY
