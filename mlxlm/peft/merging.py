"""Adapters into the weights of their base: the model is then an ordinary one that gives the same results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx import nn

from mlxlm.errors import UsageError
from mlxlm.peft.adapters import adapters_of
from mlxlm.peft.fused import modules_of
from mlxlm.peft.lora import LoraEmbeddingPart, LoraPart, dense_weight
from mlxlm.peft.places import EMBEDDING, Adapted, at, bare, put, rules_of

if TYPE_CHECKING:
    from mlxlm.models import Transformer


@dataclass(frozen=True)
class MergeReport:
    """What merging did.

    merged: modules whose weights changed.  dequantized: those that were quantized and are floats now.
    errors: of those quantized again, by path, the norm of what quantization lost by the norm of the adapter's change;
    at 1 the loss is as large as the whole change.
    """

    merged: tuple[str, ...]
    dequantized: tuple[str, ...]
    errors: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest of the errors, 0 without any."""
        return max(self.errors.values(), default=0.0)

    @property
    def mean(self) -> float:
        """The mean of the errors, 0 without any."""
        return sum(self.errors.values()) / len(self.errors) if self.errors else 0.0


def merge(model: Transformer, *, requantize: bool = False) -> MergeReport:
    """Put the active adapters, with their weights, into the base and take all adapters out, in place.

    Quantized weights that change become floats, with all that share a tensor on disk with them.
    requantize: quantize them again as they were, which loses part of the change; the report says how much.
    Raises UsageError, with nothing changed, for adapters that no weights can stand for.
    """
    adapters = adapters_of(model)
    if not adapters.active:
        raise UsageError("the model has no active adapter to merge")
    places = {path for name in adapters.known for path in adapters.known[name].content.parts}
    _check(model, places)
    touched = sorted(path for path in places if at(model, path)._active)
    errors: dict[str, float] = {}
    dequantized = []
    for path in touched:
        wrapper = at(model, path)
        base, whole = wrapper.base, dense_weight(wrapper.base).astype(mx.float32)
        weight, bias = whole, base.get("bias")
        for name, share in wrapper._active:
            part = wrapper.adapters[name]
            weight = part.merged(weight, share)
            if bias is not None and hasattr(part, "merged_bias"):
                bias = part.merged_bias(bias, share)
        quantized = hasattr(base, "bits")
        dtype = base.scales.dtype if quantized and base.scales.dtype != mx.uint8 else base.weight.dtype
        dtype = _float_dtype(model) if dtype == mx.uint32 else dtype
        result = _float_module(base, weight if quantized and requantize else weight.astype(dtype), bias)
        if quantized and requantize:
            result = result.to_quantized(group_size=base.group_size, bits=base.bits, mode=base.mode)
            lost = mx.linalg.norm(dense_weight(result).astype(mx.float32) - weight)
            errors[path] = float(lost / mx.maximum(mx.linalg.norm(weight - whole), 1e-30))
        elif quantized:
            dequantized.append(path)
        mx.eval(result.parameters())
        put(model, path, result)
    for path in places - set(touched):
        put(model, path, at(model, path).base)
    dequantized += _dequantize_neighbours(model, dequantized)
    adapters.known.clear(), adapters.active.clear(), adapters.originals.clear()
    model.freeze()
    return MergeReport(tuple(touched), tuple(dequantized), errors)


def _check(model: Transformer, places: set[str]) -> None:
    adapters = adapters_of(model)
    for name in adapters.active:
        adapter = adapters.known[name]
        content = adapter.content
        if content.prompt is not None or content.added or any(not hasattr(p, "merged") for p in content.parts.values()):
            raise UsageError(f"an adapter of kind {adapter.method.name} can't be merged: no weights do what it does")
        if len(adapters.active) > 1 and any("magnitude" in part for part in content.parts.values()):
            raise UsageError("DoRA can be merged alone, not together with other adapters")
        tied = model.config.predicts_words and not model.config.untied
        if tied and any(isinstance(part, LoraEmbeddingPart) for part in content.parts.values()):
            raise UsageError("the output shares the token table, which the adapter changes for the input alone")
        if any(
            isinstance(part, LoraPart) and isinstance(at(model, path).base, Adapted)
            for path, part in content.parts.items()
        ):
            raise UsageError("adapters around adapters can't be merged")


def _float_module(base: nn.Module, weight: mx.array, bias: mx.array | None) -> nn.Module:
    """A linear layer or a table with these values."""
    if isinstance(base, EMBEDDING):
        module: nn.Module = nn.Embedding(1, 1)
    else:
        module = nn.Linear(1, 1, bias=bias is not None)
        if bias is not None:
            module.bias = bias
    module.weight = weight
    return module


def _float_dtype(model: Transformer) -> mx.Dtype:
    norms = [array.dtype for array in _floats(model)]
    return norms[0] if norms else mx.float32


def _floats(model: Transformer) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [array for name, array in tree_flatten(model.parameters()) if "norm" in name]


def _dequantize_neighbours(model: Transformer, paths: list[str]) -> list[str]:
    """Make floats of what shares a tensor on disk with modules that have become floats; their paths."""
    rules = rules_of(model)
    if not rules or not paths:
        return []
    more = [
        path for module in modules_of(rules, paths) for path in module.paths if hasattr(bare(at(model, path)), "bits")
    ]
    for path in more:
        base = bare(at(model, path))
        put(model, path, _float_module(base, dense_weight(base), base.get("bias")))
    return more
