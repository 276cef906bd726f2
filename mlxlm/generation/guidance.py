"""Classifier-free guidance: answers that lean away from what another prompt would give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxlm.errors import PromptError, SamplingError
from mlxlm.generation.steps import Steps


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance of language models (Sanchez et al. 2023, arXiv:2306.17806).

    log p = log p(. | negative) + scale * (log p(. | prompt) - log p(. | negative)), each answer read twice.

    scale: 1 changes nothing, above 1 leans towards the prompt, 0 answers the negative prompt.
    negative: tokens of the prompt to lean away from, such as the prompt without what matters in it.
    """

    scale: float
    negative: tuple[int, ...]

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise SamplingError(f"the guidance scale is {self.scale}, but must be a number")
        if not self.negative:
            raise PromptError("the negative prompt is empty: it has no tokens")


class GuidedSteps:
    """Two `Steps` of one model, of the prompt and of the negative one, whose logits are joined."""

    def __init__(self, steps: Steps, other: Steps, guidance: Guidance):
        self._steps, self._other, self._guidance = steps, other, guidance
        self.stepping = steps.stepping

    def start(self, rows: Sequence[Sequence[int]]) -> mx.array:
        """See `Steps.start`; rows: the one prompt."""
        return self._guided(self._steps.start(rows), self._other.start([self._guidance.negative]))

    def step(self, tokens: mx.array) -> mx.array:
        """See `Steps.step`."""
        return self._guided(self._steps.step(tokens), self._other.step(tokens))

    def _guided(self, logits: mx.array, negative: mx.array) -> mx.array:
        logits, negative = (
            one - mx.logsumexp(one, axis=-1, keepdims=True)
            for one in (logits.astype(mx.float32), negative.astype(mx.float32))
        )
        return negative + self._guidance.scale * (logits - negative)
