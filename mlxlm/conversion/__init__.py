"""Conversion of models: any checkpoint that can be read, to Hugging Face, MLX-quantized or GGUF files.

    from mlxlm.conversion import MlxTarget, Recipe, convert, quantization
    convert("path/to/model", "path/to/result", MlxTarget(recipe=Recipe(default=quantization(4))))

Tensors stream through, one module at a time; see `convert`.
"""

from __future__ import annotations

from mlxlm.conversion.conversion import Conversion, TensorMove, convert, dry_run
from mlxlm.conversion.publication import check_repository, upload
from mlxlm.conversion.recipes import Recipe, parse_form, parse_layer, quantization, read_recipe, recipe_json
from mlxlm.conversion.request import METHODS, Report, Request, fulfil
from mlxlm.conversion.targets import GGUF_TYPES, GgufTarget, HubTarget, MlxTarget
from mlxlm.conversion.verification import Verification, verify

__all__ = [
    "GGUF_TYPES",
    "METHODS",
    "Conversion",
    "GgufTarget",
    "HubTarget",
    "MlxTarget",
    "Recipe",
    "Report",
    "Request",
    "TensorMove",
    "Verification",
    "check_repository",
    "convert",
    "dry_run",
    "fulfil",
    "parse_form",
    "parse_layer",
    "quantization",
    "read_recipe",
    "recipe_json",
    "upload",
    "verify",
]
