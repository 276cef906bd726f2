"""Conversion of models: any checkpoint that can be read, to Hugging Face, MLX-quantized or GGUF files.

    from mlxlm.conversion import MlxTarget, Recipe, convert, quantization
    convert("path/to/model", "path/to/result", MlxTarget(recipe=Recipe(default=quantization(4))))

Tensors stream through, one module at a time; see `convert`.
"""

from __future__ import annotations

from mlxlm.conversion.convert import Conversion, TensorMove, convert, dry_run
from mlxlm.conversion.recipes import Recipe, parse_form, parse_layer, quantization, read_recipe, recipe_json
from mlxlm.conversion.targets import GGUF_TYPES, GgufTarget, HubTarget, MlxTarget

__all__ = [
    "GGUF_TYPES",
    "Conversion",
    "GgufTarget",
    "HubTarget",
    "MlxTarget",
    "Recipe",
    "TensorMove",
    "convert",
    "dry_run",
    "parse_form",
    "parse_layer",
    "quantization",
    "read_recipe",
    "recipe_json",
]
