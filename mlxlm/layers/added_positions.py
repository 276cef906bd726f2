"""Position encodings without weights that are added to the token embeddings: sinusoidal, normalised, binary."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlm.errors import ConfigError
from mlxlm.layers.positions import TokenPositions
from mlxlm.layers.spec import Spec


@dataclass(frozen=True, kw_only=True)
class SinusoidalPositionsSpec(Spec):
    """Sines and cosines of geometrically spaced wavelengths (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

    Feature 2i of position p is sin(p / base^(2i/dim)), feature 2i+1 the cosine. The encoding of p + k is a rotation of
    that of p which depends on k alone.

    dim: features, even.  base: default 10000.
    """

    dim: int
    base: float = 10000.0

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ConfigError(f"sinusoidal positions pair sines with cosines: dim must be even, not {self.dim}")

    @property
    def limit(self) -> int | None:
        """Usable positions: any number."""
        return None

    def build(self) -> SinusoidalPositions:
        """The module, TokenPositions -> (1 or B, L, dim)."""
        return SinusoidalPositions(self)


class SinusoidalPositions(nn.Module):
    """See `SinusoidalPositionsSpec`. Has no weights."""

    def __init__(self, spec: SinusoidalPositionsSpec):
        super().__init__()
        self.spec = spec
        # Underscored attributes are no parameters to mlx.nn. Made in float64: long positions multiply every rounding.
        self._inverse = mx.array((spec.base ** -(np.arange(0, spec.dim, 2) / spec.dim)).astype(np.float32))

    def __call__(self, positions: TokenPositions) -> mx.array:
        angles = positions.array()[..., None].astype(mx.float32) * self._inverse
        return mx.stack([mx.sin(angles), mx.cos(angles)], axis=-1).reshape(*angles.shape[:-1], self.spec.dim)


@dataclass(frozen=True, kw_only=True)
class NormalizedPositionsSpec(Spec):
    """Positions scaled to [0, 1], the same value in every feature: p / (length - 1).

    The simplest of encodings, of no paper of its own, kept for study beside the sinusoids of Vaswani et al. 2017
    (arXiv:1706.03762): how far a step of one token reaches depends on the length, so nothing
    learned about distances carries over from one length to another.

    dim: features.  length: that maps to [0, 1], default the context so far (with a cache it grows from call to call).
    """

    dim: int
    length: int | None = None

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ConfigError(f"the length of normalised positions must be at least 1, not {self.length}")

    @property
    def limit(self) -> int | None:
        """Usable positions: those up to the given length."""
        return self.length

    def build(self) -> NormalizedPositions:
        """The module, TokenPositions -> (1 or B, L, dim)."""
        return NormalizedPositions(self)


class NormalizedPositions(nn.Module):
    """See `NormalizedPositionsSpec`. Has no weights."""

    def __init__(self, spec: NormalizedPositionsSpec):
        super().__init__()
        self.spec = spec

    def __call__(self, positions: TokenPositions) -> mx.array:
        length = positions.length if self.spec.length is None else self.spec.length
        last = mx.maximum(mx.array(length) - 1, 1).astype(mx.float32)
        share = positions.array().astype(mx.float32) / last
        return mx.broadcast_to(share[..., None], (*share.shape, self.spec.dim))


@dataclass(frozen=True, kw_only=True)
class BinaryPositionsSpec(Spec):
    """The binary digits of the position, lowest first, one a feature: 0.0 or 1.0.

    What the sinusoids of Vaswani et al. 2017 (arXiv:1706.03762) make smooth: feature i flips every 2^i positions. No
    paper proposes it for Transformers; it is kept for study.

    dim: features; positions below 2^dim are told apart.
    """

    dim: int

    @property
    def limit(self) -> int | None:
        """Usable positions: as many as dim digits can count."""
        return 2**self.dim

    def build(self) -> BinaryPositions:
        """The module, TokenPositions -> (1 or B, L, dim)."""
        return BinaryPositions(self)


class BinaryPositions(nn.Module):
    """See `BinaryPositionsSpec`. Has no weights."""

    def __init__(self, spec: BinaryPositionsSpec):
        super().__init__()
        self.spec = spec

    def __call__(self, positions: TokenPositions) -> mx.array:
        digits = min(self.spec.dim, 31)  # an int32 has no more; the features above stay 0
        bits = (positions.array()[..., None].astype(mx.int32) >> mx.arange(digits, dtype=mx.int32)) & 1
        padding = [(0, 0)] * (bits.ndim - 1) + [(0, self.spec.dim - digits)]
        return mx.pad(bits.astype(mx.float32), padding)
