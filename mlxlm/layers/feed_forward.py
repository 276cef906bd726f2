"""The position-wise feed-forward layer, plain or gated."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlxlm.layers.activations import activation, fused, sparing
from mlxlm.layers.joined import FEW_TOKENS, JoinedLinear, applied
from mlxlm.layers.spec import Spec
from mlxlm.runtime import backend


@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec(Spec):
    """Plain: down(act(up(x))) (Vaswani et al. 2017, arXiv:1706.03762).

    Gated: down(act(gate(x)) * up(x)), the GLU family of Shazeer 2020 (arXiv:2002.05202): activation "sigmoid" is
    GLU, "identity" Bilinear, "relu" ReGLU, "gelu" GeGLU, "silu" SwiGLU.

    dim: features in and out.  hidden_dim: features between.  activation: a name from `activations`.
    gated: default False.  bias: on every projection, default False.
    dropout: of the hidden features in training, default 0.
    """

    dim: int
    hidden_dim: int
    activation: str
    gated: bool = False
    bias: bool = False
    dropout: float = 0.0

    def build(self) -> FeedForward:
        """The module, (..., dim) -> (..., dim)."""
        return FeedForward(self)


class FeedForward(nn.Module):
    """See `FeedForwardSpec`. Weights: up, down and, when gated, gate."""

    def __init__(self, spec: FeedForwardSpec):
        super().__init__()
        self.spec = spec
        act = activation(spec.activation)
        inner = (lambda gate, up: act(gate) * up) if spec.gated else act
        self._inner = fused(inner)
        # On the CPU an activation costs more than the memory that its intermediate results take.
        self._trained = self._inner if backend() == "cpu" else sparing(inner)
        if spec.gated:
            self.gate = nn.Linear(spec.dim, spec.hidden_dim, bias=spec.bias)
        self.up = nn.Linear(spec.dim, spec.hidden_dim, bias=spec.bias)
        self.down = nn.Linear(spec.hidden_dim, spec.dim, bias=spec.bias)
        self.dropout = nn.Dropout(spec.dropout)
        # gate and up as one product, where `join` made one. No parameter to mlx.nn.
        self._joined: JoinedLinear | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self._joined is not None:
            if self.training or not self._joined.holds(self.gate, self.up):
                self._joined = None  # other weights are there, or will be
            elif x.shape[-2] <= FEW_TOKENS:
                return applied(self.down, self.dropout(self._inner(*mx.split(self._joined(x), 2, axis=-1))))
        inner = self._trained if self.training else self._inner
        up = applied(self.up, x)
        hidden = inner(applied(self.gate, x), up) if self.spec.gated else inner(up)
        return applied(self.down, self.dropout(hidden))

    def join(self) -> None:
        """Compute gate and up as one where that is possible; for inference, see `joined`."""
        if not self.spec.gated:
            return
        layers = (self.gate, self.up)
        if self._joined is None or not self._joined.holds(*layers):
            self._joined = JoinedLinear(layers) if JoinedLinear.joins(layers) else None
