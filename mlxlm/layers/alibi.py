"""Attention with linear biases: scores that fall with the distance between query and key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlm.errors import ConfigError
from mlxlm.layers.positions import AttentionPositions
from mlxlm.layers.spec import Spec


def alibi_slopes(num_heads: int, max_exponent: float = 8.0) -> np.ndarray:
    """The slope of each head, float32 (num_heads,): a geometric series from 2^(-max_exponent/n) to 2^-max_exponent.

    n is num_heads when that is a power of two. Otherwise the series for the next smaller power of two comes first, and
    every other value of the next larger one's fills the rest (Press et al. 2021, arXiv:2108.12409, and its code).
    """
    below = 2 ** math.floor(math.log2(num_heads))
    series = 2.0 ** (-max_exponent / below * np.arange(1, below + 1))
    between = 2.0 ** (-max_exponent / (2 * below) * np.arange(1, 2 * below + 1, 2))
    return np.concatenate([series, between])[:num_heads].astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class AlibiSpec(Spec):
    """Attention with linear biases, ALiBi (Press, Smith and Lewis 2021, arXiv:2108.12409).

    score(i, j) = scale * q.k - slope * |i - j| / divisor.

    num_heads: query heads.  max_exponent: the last head's slope is 2^-max_exponent, default 8.
    divisor: default 1; the root of the head's width where a checkpoint scaled the sum of both terms.
    rounded: the slopes, and their products with the keys' positions, are rounded to bfloat16, as some checkpoints were
    trained. The term is then slope * j, which differs from the paper's by what is the same for all keys of a query.
    """

    num_heads: int
    max_exponent: float = 8.0
    divisor: float = 1.0
    rounded: bool = False

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ConfigError(f"linear biases need at least one head, not {self.num_heads}")
        if not self.divisor > 0:
            raise ConfigError(f"the divisor of linear biases must be positive, not {self.divisor}")

    def build(self) -> Alibi:
        """The module."""
        return Alibi(self)


class Alibi(AttentionPositions):
    """See `AlibiSpec`. Has no weights."""

    def __init__(self, spec: AlibiSpec):
        super().__init__()
        self.spec = spec
        # Underscored attributes are no parameters to mlx.nn.
        self._slopes = mx.array(alibi_slopes(spec.num_heads, spec.max_exponent))

    def score_terms(self, query_length: int, key_length: int, offset: int | mx.array) -> dict[str, Any]:
        """See `AttentionPositions.score_terms`: `alibi_slopes`, or `bias` (1, H, 1, S) when rounded."""
        if not self.spec.rounded:
            return {"alibi_slopes": self._slopes / self.spec.divisor}
        keys = mx.arange(key_length).astype(mx.bfloat16)
        terms = self._slopes.astype(mx.bfloat16)[:, None] * keys
        return {"bias": (terms.astype(mx.float32) / self.spec.divisor)[None, :, None]}
