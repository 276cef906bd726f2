"""How the next token is chosen from logits: the options, and what each of them does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxlm.errors import SamplingError, WeightsError

if TYPE_CHECKING:
    from mlxlm.generation.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Filters apply in the order of the fields.

    repetition_penalty: > 0, above 1 avoids repetition; logits of tokens that occurred in prompt or answer are divided
        by it when positive, multiplied when negative (Keskar et al. 2019, arXiv:1909.05858). Default 1, off.
    logit_bias: added to the logits of tokens, by id.
    temperature: divides the logits; 0, the default, takes the likeliest token and ignores the filters below.
    top_k: keep the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833). Default 0, all.
    top_p: keep the smallest set of likeliest tokens with that much probability (Holtzman et al. 2019,
        arXiv:1904.09751). Default 1, all.
    min_p: keep tokens with at least that share of the likeliest one's probability (Nguyen et al. 2024,
        arXiv:2407.01082). Default 0, all.
    seed: of the random numbers; default drawn anew. The same seed, model and machine give the same tokens.

    Raises SamplingError for values outside their domain.
    """

    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._domain("temperature", self.temperature >= 0, "0 (greedy) or more")
        self._domain("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        self._domain("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._domain("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "a whole number, 0 for all tokens")
        self._domain("repetition_penalty", self.repetition_penalty > 0, "more than 0 (1 is off)")
        self._domain("seed", self.seed is None or 0 <= self.seed < 2**64, "a whole number of 0 or more")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias):
                raise SamplingError(f"logit_bias of token {token} is not a number")

    def _domain(self, name: str, valid: bool, expected: str) -> None:
        value = getattr(self, name)
        if not valid or (isinstance(value, float) and not math.isfinite(value)):
            raise SamplingError(f"{name} is {value}, but must be {expected}")

    def sampler(self, prompt: list[int], vocab_size: int) -> Sampler:
        """A sampler of one row, for an answer to `prompt` over `vocab_size` tokens."""
        from mlxlm.generation.sampler import Sampler

        sampler = Sampler(vocab_size)
        sampler.join([self], [prompt])
        return sampler


def chosen(token: int) -> int:
    """The token that a `Sampler` chose. Raises WeightsError when the model's logits were not numbers."""
    if token < 0:
        raise broken_logits()
    return token


def broken_logits() -> WeightsError:
    """The error for logits that are not numbers."""
    return WeightsError(
        "the model's logits are not numbers (NaN): its weights are damaged, or too large for its dtype; "
        "try dtype='float32', or download the checkpoint again"
    )


def penalize(logits: mx.array, seen: mx.array, penalty: float | mx.array) -> mx.array:
    """Logits (..., V) with those of `seen` (..., V) bool tokens made less likely by `penalty`, one or (..., 1)."""
    return mx.where(seen, mx.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Logits (..., V) with all but the k largest at -inf; of equal ones at the border all stay."""
    border = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(logits < border, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: float | mx.array) -> mx.array:
    """Logits (..., V) with all but the smallest set of largest ones of joint probability >= p (or (..., 1)) at -inf."""
    order = mx.argsort(-logits, axis=-1)
    probabilities = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1, precise=True)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept = mx.put_along_axis(mx.zeros(logits.shape, dtype=mx.bool_), order, before < p, axis=-1)
    return mx.where(kept, logits, -mx.inf)


def keep_min_p(logits: mx.array, p: float | mx.array) -> mx.array:
    """Logits (..., V) with all whose probability is below p times the largest one at -inf.  p: one or (..., 1)."""
    border = mx.max(logits, axis=-1, keepdims=True) + (mx.log(p) if isinstance(p, mx.array) else math.log(p))
    return mx.where(logits < border, -mx.inf, logits)
