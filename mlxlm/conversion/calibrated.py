"""Quantizing by what a model's modules really get: error compensation and scaling, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxlm.checkpoint import Quantization, dequantize
from mlxlm.conversion.calibration import check_language_model, gram_matrices, layer_inputs
from mlxlm.conversion.compensation import compensated
from mlxlm.conversion.quantizing import Packed, quantize
from mlxlm.conversion.scaling import scale_layer
from mlxlm.conversion.sensitivity import Said
from mlxlm.errors import UsageError
from mlxlm.models import Transformer


@dataclass
class Prepared:
    """Weights for `MlxTarget`: modules that are quantized, and others that were changed on the way."""

    prepared: dict[str, Packed] = field(default_factory=dict)
    floats: dict[str, mx.array] = field(default_factory=dict)


def prepare(
    model: Transformer,
    forms: Mapping[str, Quantization],
    rows: mx.array,
    *,
    compensate: bool,
    scale: bool,
    dtype: mx.Dtype,
    say: Said | None = None,
) -> Prepared:
    """Quantize the linear modules in a decoder's layers; the model is changed into what the result computes.

    forms: canonical path -> quantization; what isn't in a layer (table, head) is left to plain rounding.
    rows: tokens (B, L) to calibrate on.  compensate: GPTQ.  scale: AWQ; with both, weights are scaled first.
    dtype: of scales and of the floats in the result.  say: told about progress.
    Raises UsageError for other than language models and when scaling finds nothing to scale.
    """
    check_language_model(model)
    result = Prepared()
    inputs = layer_inputs(model, rows)
    scaled = False
    for number, layer in enumerate(model.decoder.layers):
        prefix = f"decoder.layers.{number}."
        grams, sizes = gram_matrices(layer, inputs)
        changed = scale_layer(layer, prefix, forms, grams, sizes, dtype) if scale else []
        scaled = scaled or bool(changed)
        for path, gram in grams.items():
            form = forms.get(prefix + path)
            if form is not None:
                result.prepared[prefix + path] = _quantize(layer, path, gram, form, compensate, dtype)
        own = dict(tree_flatten(layer.parameters()))
        for name in changed:
            if name.removesuffix(".weight") not in result.prepared:
                result.floats[name] = own[name.removeprefix(prefix)]
        inputs = [(layer(x, scope, None, None), scope) for x, scope in inputs]
        mx.eval([x for x, _ in inputs], result.floats)
        if say is not None:
            say(f"calibration: layer {number + 1} of {len(model.decoder.layers)}")
    if scale and not scaled:
        raise UsageError("scaling needs norms in front of quantized projections; this model has none")
    return result


def _quantize(
    layer: object, path: str, gram: mx.array, form: Quantization, compensate: bool, dtype: mx.Dtype
) -> Packed:
    """One module; its weight becomes the values of the packed one, so that later layers get what they will get."""
    module = layer
    for step in path.split("."):
        module = getattr(module, step)
    if compensate:
        packed, values = compensated(module.weight, gram, form, dtype)
    else:
        packed = quantize(module.weight.astype(dtype), form)
        values = dequantize(*packed, form, mx.float32)
    module.weight = values.astype(module.weight.dtype)
    mx.eval(packed, module.weight)
    return packed
