"""Penalties on what was said, against their formula."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import SamplingError
from mlxlm.generation import CountPenalties, stream_generate


def test_a_greedy_answer_with_penalties_is_that_of_the_formula(tiny):
    model, tokenizer = tiny
    prompt, frequency, presence = tokenizer.encode("hello"), 0.3, 0.15
    answer: list[int] = []
    for _ in range(25):
        logits = np.array(model(mx.array([prompt + answer]))[0, -1], dtype=np.float64)
        counts = np.bincount(answer, minlength=67)
        logits -= frequency * counts + presence * (counts > 0)
        answer.append(int(logits.argmax()))
    penalties = CountPenalties(67, frequency=frequency, presence=presence)
    pieces = list(stream_generate(model, tokenizer, prompt, max_tokens=25, processors=[penalties]))
    assert [piece.token for piece in pieces] == answer
    free = list(stream_generate(model, tokenizer, prompt, max_tokens=25))
    assert [piece.token for piece in free] != answer


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(SamplingError, match="presence"):
        CountPenalties(67, presence=float("nan"))
