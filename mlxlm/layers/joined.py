"""Linear layers that read the same input, computed as one.

A decoding step is bound by the number of its operations and by how well each reads its weights, so one product with
three weights below each other is faster than three products. The layers stay what they are: after joining, their
weights are views of the joined one, so nothing is held twice, and names, saving and adapters know nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from mlxlm.kernels.few_rows import few_rows_product
from mlxlm.kernels.few_rows import pays as blocks_pay

# More tokens than that are computed apart: large products gain nothing, and their parts would not be contiguous.
FEW_TOKENS = 8

_PARTS = ("weight", "scales", "biases", "bias")
_FORM = ("group_size", "bits", "mode")


def parts_of(layer: nn.Module) -> dict[str, mx.array]:
    """The arrays of a linear layer or an embedding, plain or quantized, by name; only those that it has."""
    return {name: layer[name] for name in _PARTS if name in layer}


def form_of(layer: nn.Module) -> dict[str, Any]:
    """How its weight is quantized, as keywords of `mx.quantized_matmul`; nothing for a plain one."""
    return {name: getattr(layer, name) for name in _FORM if hasattr(layer, name)}


class JoinedLinear:
    """Float or quantized linear layers of one input as a single product, as long as they are what they were.

    parts, form: as `parts_of` and `form_of` have them, of all layers together.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = tuple(layers)
        self.parts: dict[str, mx.array] = {}
        for name in _PARTS:
            arrays = [layer[name] for layer in layers if name in layer]
            if not arrays:
                continue
            joined = mx.concatenate(arrays, axis=0)
            mx.eval(joined)
            self.parts[name] = joined
            start = 0
            for layer, array in zip(layers, arrays, strict=True):
                layer[name] = joined[start : start + array.shape[0]]
                start += array.shape[0]
            mx.eval([layer[name] for layer in layers])
        self._held = tuple(parts_of(layer) for layer in layers)
        self.form = form_of(layers[0])

    @staticmethod
    def joins(layers: Sequence[nn.Module]) -> bool:
        """Whether the layers can be joined: plain linear ones, or quantized ones of one form, with or without bias."""
        kinds = {type(layer) for layer in layers}
        if len(kinds) != 1 or not kinds <= {nn.Linear, nn.QuantizedLinear}:
            return False
        forms = {tuple(form_of(layer).items()) for layer in layers}
        parts = {tuple((name, array.dtype) for name, array in parts_of(layer).items()) for layer in layers}
        return len(forms) == len(parts) == 1

    def holds(self, *layers: nn.Module) -> bool:
        """Whether these are the joined layers, and nobody has changed their weights since."""
        return all(
            layer is own and _same(parts_of(layer), held)
            for layer, own, held in zip(layers, self.layers, self._held, strict=True)
        )

    def __call__(self, x: mx.array) -> mx.array:
        """(..., all features out) of x (..., dim), those of the first layer first."""
        parts = self.parts
        if "scales" in parts:
            out = mx.quantized_matmul(
                x, parts["weight"], parts["scales"], parts.get("biases"), transpose=True, **self.form
            )
            return out + parts["bias"] if "bias" in parts else out
        return linear(x, parts["weight"], parts.get("bias"))


def _same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(array is other[name] for name, array in one.items())


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x @ weight.T + bias, (..., N) of x (..., K) and weight (N, K)."""
    if bias is None:
        return few_rows_product(x, weight)
    if blocks_pay():
        return few_rows_product(x, weight) + bias
    return mx.addmm(bias, x, weight.T)


def applied(layer: nn.Module, x: mx.array) -> mx.array:
    """layer(x), in the way that is fastest for a few tokens.

    layer: any linear one, also what replaced it; or an embedding, whose table is the weight (`as_linear`).
    """
    if type(layer) is nn.Linear:
        return linear(x, layer["weight"], layer.get("bias"))
    if type(layer) is nn.Embedding:
        return linear(x, layer["weight"])
    return layer.as_linear(x) if hasattr(layer, "as_linear") else layer(x)  # type: ignore[no-any-return]
