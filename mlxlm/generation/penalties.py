"""Penalties on what an answer has said already, as OpenAI's API has them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxlm.errors import SamplingError


class CountPenalties:
    """Makes tokens less likely that the answer holds already; a `Processor` of one answer.

    logit -= frequency * (times the answer holds the token) + presence * (whether it does); negative values make such
    tokens likelier. The prompt does not count.  words: how many there are to choose from.
    """

    def __init__(self, words: int, *, frequency: float = 0.0, presence: float = 0.0):
        for name, value in (("frequency", frequency), ("presence", presence)):
            if not -1e3 <= value <= 1e3:
                raise SamplingError(f"the {name} penalty is {value}, but must be a number of -1000 to 1000")
        self._frequency, self._presence = frequency, presence
        self._counts = np.zeros(words, dtype=np.float32)
        self._read = 0

    def __call__(self, answer: Sequence[int]) -> mx.array | None:
        """What to add to the logits, (words,)."""
        for token in answer[self._read :]:
            self._counts[token] += 1
        self._read = len(answer)
        return mx.array(-self._frequency * self._counts - self._presence * (self._counts > 0)) if answer else None
