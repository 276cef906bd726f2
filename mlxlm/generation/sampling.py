"""Choosing the next token from logits, on the device and without waiting for it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlxlm.errors import SamplingError, WeightsError


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
        """A sampler for one answer to `prompt` over `vocab_size` tokens."""
        return Sampler(self, prompt, vocab_size)


class Sampler:
    """Chooses token after token of one answer; remembers what occurred. See `Sampling`."""

    def __init__(self, sampling: Sampling, prompt: list[int], vocab_size: int):
        self.sampling = sampling
        self.vocab_size = vocab_size
        self._key: mx.array | None = None
        if sampling.temperature > 0:
            seed = int.from_bytes(os.urandom(4), "little") if sampling.seed is None else sampling.seed
            self._key = mx.random.key(seed)
        self._bias: mx.array | None = None
        if sampling.logit_bias:
            for token in sampling.logit_bias:
                if not 0 <= token < vocab_size:
                    raise SamplingError(f"logit_bias names token {token}, but ids run from 0 to {vocab_size - 1}")
            ids = mx.array(list(sampling.logit_bias))
            self._bias = mx.zeros((vocab_size,)).at[ids].add(mx.array(list(sampling.logit_bias.values())))
        self._seen: mx.array | None = None
        if sampling.repetition_penalty != 1:
            self._seen = mx.zeros((vocab_size,), dtype=mx.bool_)
            self._seen[mx.array(prompt)] = True

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token, (1,) int, from logits (1, V or more); those of ids beyond the vocabulary don't count.

        -1 when one of them is not a number: `chosen` makes an error of it once the token is read.
        """
        logits = logits[:, : self.vocab_size]
        broken = mx.any(mx.isnan(logits), axis=-1)
        plain = self._seen is None and self._bias is None
        if not plain:
            logits = logits.astype(mx.float32)
        if self._seen is not None:
            logits = penalize(logits, self._seen, self.sampling.repetition_penalty)
        if self._bias is not None:
            logits = logits + self._bias
        if self._key is None:
            token = mx.argmax(logits, axis=-1)
        else:
            self._key, now = mx.random.split(self._key)
            token = mx.random.categorical(self._filtered(logits), key=now)
        if self._seen is not None:
            self._seen = self._seen | (mx.arange(self._seen.size) == token)
        return mx.where(broken, -1, token.astype(mx.int32))

    def _filtered(self, logits: mx.array) -> mx.array:
        logits = logits.astype(mx.float32)
        # The largest is made 0 first, so that a tiny temperature gives the greedy choice and not infinities.
        logits = (logits - mx.max(logits, axis=-1, keepdims=True)) / self.sampling.temperature
        if 0 < self.sampling.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, self.sampling.top_k)
        if self.sampling.top_p < 1:
            logits = keep_top_p(logits, self.sampling.top_p)
        if self.sampling.min_p > 0:
            logits = keep_min_p(logits, self.sampling.min_p)
        return logits


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


def penalize(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Logits (..., V) with those of `seen` (V,) bool tokens made less likely by `penalty`."""
    return mx.where(seen, mx.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Logits (..., V) with all but the k largest at -inf; of equal ones at the border all stay."""
    border = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(logits < border, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """Logits (..., V) with all but the smallest set of largest ones of joint probability >= p at -inf."""
    order = mx.argsort(-logits, axis=-1)
    probabilities = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1, precise=True)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept = mx.put_along_axis(mx.zeros(logits.shape, dtype=mx.bool_), order, before < p, axis=-1)
    return mx.where(kept, logits, -mx.inf)


def keep_min_p(logits: mx.array, p: float) -> mx.array:
    """Logits (..., V) with all whose probability is below p times the largest one at -inf."""
    border = mx.max(logits, axis=-1, keepdims=True) + math.log(p)
    return mx.where(logits < border, -mx.inf, logits)
