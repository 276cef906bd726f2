"""Numerical kernels: arrays in, arrays out; no Modules."""

from __future__ import annotations

from mlxlm.kernels.attention import AttentionMask, attention
from mlxlm.kernels.cross_entropy import (
    QuantizedWeight,
    fused_linear_cross_entropy,
    reference_linear_cross_entropy,
    token_log_probabilities,
)

__all__ = [
    "AttentionMask",
    "QuantizedWeight",
    "attention",
    "fused_linear_cross_entropy",
    "reference_linear_cross_entropy",
    "token_log_probabilities",
]
