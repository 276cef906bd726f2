"""AWQ: inputs that matter get larger weights, and what gives them is divided by as much.

Lin et al. 2023, arXiv:2306.00978. For a factor s of every input, W x = (W diag(s)) (x / s): the product stays the same,
but the rounding of W diag(s) errs less where s is large. s = mean(|x|) ** ratio, with the ratio of least output error.
The division goes into the norm or the projection in front, so nothing is added to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
from mlx import nn

from mlxlm.checkpoint import Quantization, dequantize
from mlxlm.conversion.quantizing import quantize
from mlxlm.layers import Block, OffsetRMSNorm

_RATIOS = tuple(step / 10 for step in range(10))


def scale_layer(
    layer: nn.Module,
    prefix: str,
    forms: Mapping[str, Quantization],
    grams: dict[str, mx.array],
    sizes: dict[str, mx.array],
    dtype: mx.Dtype,
) -> list[str]:
    """Rescale the weights of a layer in place, its outputs staying the same. Returns canonical names of what changed.

    prefix: of the layer's canonical names, with a dot.  forms: by canonical module path.  grams, sizes: of inputs by
    path in the layer, see `gram_matrices`; changed along.  dtype: of scales.
    A layer that isn't one block after the other, or has no norm in front, is left alone in that place.
    """
    if not isinstance(layer, Block):
        return []
    changed: list[str] = []

    def rescale(paths: list[str], divide: Callable[[mx.array], list[str]]) -> None:
        modules = {path: _at(layer, path) for path in paths}
        chosen = {path: forms[prefix + path] for path in paths if prefix + path in forms}
        if len(chosen) != len(paths) or not all(path in grams for path in paths):
            return
        factors = _best_factors(
            {path: module.weight for path, module in modules.items()}, chosen, grams[paths[0]], sizes[paths[0]], dtype
        )
        changed.extend(prefix + name for name in divide(factors))
        for path, module in modules.items():
            module.weight = module.weight * factors
            grams[path] = grams[path] / factors / factors[:, None]
            sizes[path] = sizes[path] / factors

    feed_forward = layer.feed_forward
    if feed_forward.spec.gated:
        rescale(["feed_forward.down"], lambda s: _divide_rows(feed_forward.up, "feed_forward.up", s))
    for paths, residual in (
        (["attention.query", "attention.key", "attention.value"], "attention_residual"),
        (
            ["feed_forward.gate", "feed_forward.up"] if feed_forward.spec.gated else ["feed_forward.up"],
            "feed_forward_residual",
        ),
    ):
        around = getattr(layer, residual)
        kinds = (nn.RMSNorm, nn.LayerNorm, OffsetRMSNorm)
        if isinstance(around.norm_in, kinds) and not around.spec.from_normed and "weight" in around.norm_in:
            norm, name = around.norm_in, f"{residual}.norm_in"
            rescale(paths, lambda s, norm=norm, name=name: _divide_norm(norm, name, s))
    return changed


def _at(layer: nn.Module, path: str) -> nn.Module:
    for step in path.split("."):
        layer = getattr(layer, step)
    return layer


def _divide_rows(module: nn.Linear, name: str, factors: mx.array) -> list[str]:
    module.weight = module.weight / factors[:, None]
    if "bias" in module:
        module.bias = module.bias / factors
    return [f"{name}.{kind}" for kind in ("weight", "bias") if kind in module]


def _divide_norm(norm: nn.Module, name: str, factors: mx.array) -> list[str]:
    offset = norm.spec.offset if isinstance(norm, OffsetRMSNorm) else 0.0
    norm.weight = (norm.weight + offset) / factors - offset
    if "bias" in norm:
        norm.bias = norm.bias / factors
    return [f"{name}.{kind}" for kind in ("weight", "bias") if kind in norm]


def _best_factors(
    weights: Mapping[str, mx.array],
    forms: Mapping[str, Quantization],
    gram: mx.array,
    size: mx.array,
    dtype: mx.Dtype,
) -> mx.array:
    """Factors (in,) for which the modules' outputs change least; 1 where nothing is better."""
    best, factors = float("inf"), mx.ones(size.shape)
    for ratio in _RATIOS:
        candidate = mx.maximum(size, 1e-4) ** ratio
        candidate = candidate / mx.sqrt(candidate.max() * candidate.min())
        error = 0.0
        for path, weight in weights.items():
            packed = quantize((weight * candidate).astype(dtype), forms[path])
            change = dequantize(*packed, forms[path], mx.float32) / candidate - weight.astype(mx.float32)
            error += ((change @ gram) * change).sum().item()
        if error < best:
            best, factors = error, candidate
    return factors
