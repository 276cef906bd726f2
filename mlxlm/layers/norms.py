"""Normalisation layers: LayerNorm, RMSNorm, and the identity that fills an empty slot."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlxlm.layers.spec import Spec
from mlxlm.runtime import backend


@dataclass(frozen=True, kw_only=True)
class NoNormSpec(Spec):
    """An empty norm slot: passes its input on and has no weights."""

    def build(self) -> nn.Module:
        """The identity."""
        return nn.Identity()


@dataclass(frozen=True, kw_only=True)
class LayerNormSpec(Spec):
    """Layer normalisation (Ba, Kiros and Hinton 2016, arXiv:1607.06450).

    dim: features.  eps: added to the variance, default 1e-5.  bias: whether there is a shift, default True.
    """

    dim: int
    eps: float = 1e-5
    bias: bool = True

    def build(self) -> nn.Module:
        """A module (..., dim) -> (..., dim) with `weight` and, if asked, `bias`."""
        return nn.LayerNorm(self.dim, eps=self.eps, bias=self.bias)


@dataclass(frozen=True, kw_only=True)
class RMSNormSpec(Spec):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467).

    dim: features.  eps: added to the mean square, default 1e-6.
    offset: added to the stored weight, default 0; 1 stands for layers that store the distance of the scale from 1.
    """

    dim: int
    eps: float = 1e-6
    offset: float = 0.0

    def build(self) -> nn.Module:
        """A module (..., dim) -> (..., dim) with `weight`."""
        return OffsetRMSNorm(self) if self.offset else RMSNorm(self.dim, eps=self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm that makes no gradient of a frozen scale. See `RMSNormSpec`.

    MLX's makes it whether it is asked for or not: on GPUs two of the three operations of the gradient.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if self.training and "weight" in self._no_grad and backend() != "cpu":
            return _scaled_by_constant(x, self["weight"], self.eps)
        return mx.fast.rms_norm(x, self["weight"], self.eps)


def _scaled_by_constant(x: mx.array, scale: mx.array, eps: float) -> mx.array:
    """RMS normalisation of x, whose gradient is that of one without scale, by the scaled gradient of the result."""

    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, scale, eps)

    @run.vjp
    def run_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        def plain(x: mx.array) -> mx.array:
            return mx.fast.rms_norm(x, None, eps)

        return mx.vjp(plain, [x], [(cotangent * scale).astype(x.dtype)])[1][0]

    return run(x)


class OffsetRMSNorm(nn.Module):
    """RMSNorm whose scale is offset + weight, multiplied in float32. See `RMSNormSpec`."""

    def __init__(self, spec: RMSNormSpec):
        super().__init__()
        self.spec = spec
        self.weight = mx.full((spec.dim,), 1.0 - spec.offset)

    def __call__(self, x: mx.array) -> mx.array:
        scale = self.weight.astype(mx.float32) + self.spec.offset
        return mx.fast.rms_norm(x.astype(mx.float32), scale, self.spec.eps).astype(x.dtype)


NormSpec = NoNormSpec | LayerNormSpec | RMSNormSpec
