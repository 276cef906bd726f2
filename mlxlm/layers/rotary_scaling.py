"""How rotary frequencies are stretched to contexts longer than those of the pretraining.

Every choice answers two questions: the inverse frequencies for a given context length, and the factor on the rotated
queries and keys. Definitions agree with the `rope_parameters` of transformers 5; frequencies are float32 as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxlm.layers.spec import Spec


def _frequencies(base: float, dim: int, denominator: int | None = None) -> np.ndarray:
    """base ** (-2i / denominator) for i < dim / 2, float32."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(denominator or dim)
    return (1.0 / np.power(np.float32(base), exponents)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class NoScalingSpec(Spec):
    """The frequencies of the paper, base^(-2i/dim) (Su et al. 2021, arXiv:2104.09864)."""

    @property
    def depends_on_length(self) -> bool:
        """Whether `inverse_frequencies` changes with the length of the context."""
        return False

    @property
    def attention_factor(self) -> float:
        """The factor on rotated queries and on rotated keys."""
        return 1.0

    def agrees(self, one: int, other: int) -> bool:
        """Whether contexts of these two lengths have the same frequencies, so that keys of one serve in the other."""
        return True

    def inverse_frequencies(self, dim: int, base: float, length: int | mx.array = 0) -> mx.array:
        """Angle per position of each pair of features, (dim / 2,) float32.

        dim: rotated features.  base: of the geometric series.  length: highest position + 1 of the context; only
        choices that depend on the length look at it.
        """
        return mx.array(_frequencies(base, dim))


@dataclass(frozen=True, kw_only=True)
class LinearScalingSpec(NoScalingSpec):
    """Position interpolation: positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def inverse_frequencies(self, dim: int, base: float, length: int | mx.array = 0) -> mx.array:
        """See `NoScalingSpec.inverse_frequencies`."""
        return mx.array(_frequencies(base, dim) / np.float32(self.factor))


@dataclass(frozen=True, kw_only=True)
class DynamicScalingSpec(NoScalingSpec):
    """NTK-aware scaling whose base grows with the context once it exceeds `original_length` (Peng et al. 2023,
    arXiv:2309.00071, section 3.2 and appendix B).

    Keys already in a cache keep the frequencies with which they were rotated, as in transformers.
    """

    factor: float
    original_length: int

    @property
    def depends_on_length(self) -> bool:
        """True: see the class."""
        return True

    def agrees(self, one: int, other: int) -> bool:
        """See `NoScalingSpec.agrees`."""
        return max(one, self.original_length) == max(other, self.original_length)

    def inverse_frequencies(self, dim: int, base: float, length: int | mx.array = 0) -> mx.array:
        """See `NoScalingSpec.inverse_frequencies`."""
        length = mx.maximum(mx.array(length, dtype=mx.float32), float(self.original_length))
        growth = self.factor * length / self.original_length - (self.factor - 1)
        grown_base = base * growth ** (dim / (dim - 2))
        return 1.0 / mx.power(grown_base, mx.arange(0, dim, 2, dtype=mx.float32) / dim)


@dataclass(frozen=True, kw_only=True)
class YarnScalingSpec(NoScalingSpec):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): low frequencies interpolated, high ones kept, a ramp between.

    factor: context growth.  original_length: of the pretraining.  beta_fast, beta_slow: rotations within the original
    length above which a frequency is kept and below which it is divided by `factor`, defaults 32 and 1.
    mscale, mscale_all_dim: weights of log(factor) in the attention factor, default none.  explicit_factor: the
    attention factor itself, default 0.1 log(factor) + 1.  truncate: round the ends of the ramp, default True.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    explicit_factor: float | None = None
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        """See `NoScalingSpec.attention_factor`."""
        if self.explicit_factor is not None:
            return self.explicit_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    def inverse_frequencies(self, dim: int, base: float, length: int | mx.array = 0) -> mx.array:
        """See `NoScalingSpec.inverse_frequencies`."""

        def feature_of(rotations: float) -> float:
            return dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = feature_of(self.beta_fast), feature_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if low == high else high
        interpolated = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        kept = _frequencies(base, dim)
        return mx.array((kept / self.factor * interpolated + kept * (1 - interpolated)).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class LongScalingSpec(NoScalingSpec):
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): one factor a frequency, other ones past the original length.

    short_factors, long_factors: dim / 2 numbers each.  original_length: where the long ones begin.
    factor: context growth, for the attention factor sqrt(1 + log(factor) / log(original_length)).
    explicit_factor: the attention factor itself.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    factor: float
    explicit_factor: float | None = None

    @property
    def depends_on_length(self) -> bool:
        """Whether the two kinds of factors differ."""
        return self.short_factors != self.long_factors

    @property
    def attention_factor(self) -> float:
        """See `NoScalingSpec.attention_factor`."""
        if self.explicit_factor is not None:
            return self.explicit_factor
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def agrees(self, one: int, other: int) -> bool:
        """See `NoScalingSpec.agrees`."""
        return not self.depends_on_length or (one > self.original_length) == (other > self.original_length)

    def inverse_frequencies(self, dim: int, base: float, length: int | mx.array = 0) -> mx.array:
        """See `NoScalingSpec.inverse_frequencies`."""
        plain = _frequencies(base, dim)
        short = mx.array(plain / np.array(self.short_factors, dtype=np.float32))
        long = mx.array(plain / np.array(self.long_factors, dtype=np.float32))
        if isinstance(length, int):
            return long if length > self.original_length else short
        return mx.where(length > self.original_length, long, short)


@dataclass(frozen=True, kw_only=True)
class WavelengthScalingSpec(NoScalingSpec):
    """Scaling by wavelength ("llama3" on disk; Llama 3.1, Grattafiori et al. 2024, arXiv:2407.21783): wavelengths
    longer than original_length / low_factor are stretched by `factor`, those shorter than
    original_length / high_factor are kept, with a linear blend between.
    """

    factor: float
    low_factor: float
    high_factor: float
    original_length: int

    def inverse_frequencies(self, dim: int, base: float, length: int | mx.array = 0) -> mx.array:
        """See `NoScalingSpec.inverse_frequencies`."""
        plain = _frequencies(base, dim)
        rotations = self.original_length * plain / np.float32(2 * math.pi)
        kept = np.clip((rotations - self.low_factor) / (self.high_factor - self.low_factor), 0, 1)
        return mx.array(((1 - kept) * plain / self.factor + kept * plain).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class ProportionalScalingSpec(NoScalingSpec):
    """Frequencies spaced over the whole head, of which only the first `proportion` rotate ("proportional" on disk):
    angles base^(-2i/head) for i < proportion * head / 2, zero for the rest, all divided by `factor`.
    """

    proportion: float = 1.0
    factor: float = 1.0

    def inverse_frequencies(self, dim: int, base: float, length: int | mx.array = 0) -> mx.array:
        """See `NoScalingSpec.inverse_frequencies`; `dim` is the whole head."""
        rotated = _frequencies(base, 2 * int(self.proportion * dim // 2), dim)
        still = np.zeros(dim // 2 - rotated.size, dtype=np.float32)
        return mx.array(np.concatenate([rotated, still]) / np.float32(self.factor))
