"""Rounding canonical weights to MLX's quantized forms, and what each module loses by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlxlm.checkpoint import Quantization, dequantize
from mlxlm.errors import CheckpointError

Packed = tuple[mx.array, mx.array, mx.array | None]


def quantize(weight: mx.array, form: Quantization) -> Packed:
    """Packed weight (out, in * bits / 32), scales and, in affine mode, biases (out, in / group size).

    weight: (out, in). Rounds to the nearest. Scales have the weight's dtype in affine mode.
    """
    packed, scales, *biases = mx.quantize(weight, **form.to_json())
    return packed, scales, biases[0] if biases else None


def relative_error(weight: mx.array, packed: Packed, form: Quantization) -> float:
    """The norm of what quantizing changed, by the norm of the weight."""
    values = weight.astype(mx.float32)
    change = dequantize(*packed, form, mx.float32) - values
    norm = mx.linalg.norm(values).item()
    return mx.linalg.norm(change).item() / norm if norm else 0.0


@dataclass
class Quantize:
    """The `Change` of a conversion to quantized weights.

    forms: canonical module path -> quantization.  prepared: modules that were quantized beforehand, by another method
    than rounding.  floats: canonical names of other weights that this method changed.
    errors: filled with the relative error of each module that is rounded, once its weights are real.
    """

    forms: Mapping[str, Quantization]
    prepared: Mapping[str, Packed] = field(default_factory=dict)
    floats: Mapping[str, mx.array] = field(default_factory=dict)
    measure: bool = False
    errors: dict[str, float] = field(default_factory=dict)

    def __call__(self, inside: dict[str, mx.array]) -> dict[str, mx.array]:
        """The same arrays, weights of modules in `forms` as weight, scales and biases."""
        result: dict[str, mx.array] = {}
        for name, array in inside.items():
            path = name.removesuffix(".weight")
            form = self.forms.get(path) if name.endswith(".weight") else None
            if form is None:
                result[name] = self.floats[name].astype(array.dtype) if name in self.floats else array
                continue
            packed = self.prepared[path] if path in self.prepared else quantize(array, form)
            # A scaled module's weight is no longer the source's, so there is nothing to compare it with.
            if self.measure and not (path in self.prepared and self.floats):
                self.errors[path] = self._error(path, array, packed, form)
            parts = zip(("weight", "scales", "biases"), packed, strict=True)
            result |= {f"{path}.{kind}": part for kind, part in parts if part is not None}
        return result

    def _error(self, path: str, array: mx.array, packed: Packed, form: Quantization) -> float:
        if not mx.isfinite(array).all().item():
            raise CheckpointError(f"{path}.weight holds NaN or infinite values; they can't be quantized")
        return relative_error(array, packed, form)
