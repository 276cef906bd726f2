"""What a model is in a GGUF file: metadata and tensors, ready to be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxlm.errors import UnsupportedModelError, UsageError, WeightsError, listing
from mlxlm.layers import differences
from mlxlm.models.config import TransformerConfig
from mlxlm.models.family import Family
from mlxlm.models.gguf_dialect import GgufTensors
from mlxlm.models.weights import to_hub


@dataclass(frozen=True)
class GgufContents:
    """metadata: `general.architecture` and the keys under its name: int, float, bool, str.  tensors: by their names in
    the file, row-major, linear weights (out, in). The tokenizer's keys are not among them.
    """

    metadata: dict[str, Any]
    tensors: dict[str, mx.array]


def gguf_contents(family: Family, config: TransformerConfig, parameters: Mapping[str, mx.array]) -> GgufContents:
    """The contents of a GGUF file.

    parameters: by their canonical names; rows of quantized ones are put in order with the parts of the weight.
    Raises UnsupportedModelError when llama.cpp has no architecture for the family, or no place for the model's head;
    UsageError when the metadata would be read back as another configuration: then a program that reads the file would
    compute something else. Dropout is not described and doesn't count.
    """
    dialect = family.gguf
    if dialect is None:
        raise UnsupportedModelError(f"there is no GGUF architecture for models of {family.name}")
    try:
        tensors = to_hub(dialect.rules(config), parameters)
    except WeightsError as error:
        raise UnsupportedModelError(
            f"a GGUF file has no place for all weights of this {family.name}: {error}"
        ) from None
    metadata = dialect.metadata(config, family.unparse(config))
    extra = dialect.extra_tensors(config)
    shapes = {name: array.shape for name, array in (tensors | extra).items()}
    values = dialect.config(metadata, GgufTensors(shapes, lambda name: extra[name].tolist()))
    described = family.read_config(values, dialect.weights)
    unlike = [line for line in differences(config, described) if not _immaterial(line.split(": ")[0], bool(extra))]
    if unlike:
        raise UsageError(f"the GGUF format can't describe this {family.name}: {listing(unlike, 5)}")
    return GgufContents(metadata, tensors | extra)


def _immaterial(path: str, factors: bool) -> bool:
    """Whether a difference may be: dropout, and formulas of rotary frequencies where the file holds their values."""
    return path.endswith("dropout") or (factors and path.endswith("positions.scaling"))
