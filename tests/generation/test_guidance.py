"""Classifier-free guidance and best-of-n against their formulas."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import PromptError, SamplingError, UsageError
from mlxlm.generation import Guidance, Sampling, Speculation, best_of, generate, generate_tokens, stream_generate


def log_softmax(logits):
    logits = np.array(logits, dtype=np.float64)
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("scale", [1.7, -0.5])
def test_a_guided_greedy_answer_is_that_of_the_formula(tiny, scale):
    model, tokenizer = tiny
    prompt, negative = tokenizer.encode("hello there"), tokenizer.encode("no")
    answer: list[int] = []
    for _ in range(20):
        ours, theirs = (log_softmax(model(mx.array([p + answer]))[0, -1]) for p in (prompt, negative))
        answer.append(int((theirs + scale * (ours - theirs)).argmax()))
    guidance = Guidance(scale=scale, negative=tuple(negative))
    pieces = list(stream_generate(model, tokenizer, prompt, max_tokens=20, guidance=guidance))
    assert [piece.token for piece in pieces] == answer


def test_guidance_of_1_changes_nothing_and_of_0_answers_the_negative_prompt(tiny, tiny_seq2seq):
    for model, tokenizer in (tiny, tiny_seq2seq):
        negative = tuple(tokenizer.encode("no"))
        options = {"max_tokens": 15, "stop_tokens": ()}
        one = generate(model, tokenizer, "hello", **options, guidance=Guidance(scale=1, negative=negative))
        assert one == generate(model, tokenizer, "hello", **options)
        zero = generate(model, tokenizer, "hello", **options, guidance=Guidance(scale=0, negative=negative))
        assert zero == generate(model, tokenizer, list(negative), **options)


def test_guidance_that_can_not_be_is_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(PromptError):
        Guidance(scale=1, negative=())
    with pytest.raises(SamplingError):
        Guidance(scale=float("nan"), negative=(1,))
    with pytest.raises(PromptError, match="token id 99"):
        generate(model, tokenizer, "a", guidance=Guidance(scale=2, negative=(99,)))
    guidance = Guidance(scale=2, negative=(9,))
    with pytest.raises(UsageError, match="guidance"):
        generate(model, tokenizer, "a", guidance=guidance, speculation=Speculation(prompt_lookup=2))


def test_the_best_of_n_are_the_likeliest_by_the_model(tiny):
    model, _ = tiny
    prompts, sampling = [[9, 10, 11], [20, 21]], Sampling(temperature=1.3, seed=5)
    options = {"max_tokens": 7, "sampling": sampling}
    kept = best_of(model, prompts, samples=5, keep=2, **options)
    every = generate_tokens(model, prompts, samples=5, **options)
    for number, prompt in enumerate(prompts):
        scores = {}
        for one in every[number * 5 : number * 5 + 5]:
            rows = np.array(model(mx.array([prompt + list(one.tokens)]))[0], dtype=np.float64)
            each = [log_softmax(rows[len(prompt) - 1 + i])[token] for i, token in enumerate(one.tokens)]
            scores[one.tokens] = float(np.mean(each))
        ordered = sorted(scores, key=lambda tokens: -scores[tokens])
        assert [one.tokens for one in kept[number]] == ordered[:2]
        assert kept[number][0].mean_log_probability == pytest.approx(scores[ordered[0]], abs=1e-4)
    with pytest.raises(UsageError, match="keep"):
        best_of(model, prompts, samples=2, keep=3)
    with pytest.raises(UsageError, match="not asked for"):
        _ = every[0].mean_log_probability
