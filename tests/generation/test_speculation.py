"""Guessing ahead changes nothing but the speed: the same greedy answers, the same distributions."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest

import mlxlm
from mlxlm.errors import UsageError
from mlxlm.generation import Sampling, Speculation
from mlxlm.generation.speculation import DraftModel, PromptLookup, _verified, speculative_decode
from mlxlm.layers import CacheSpec
from mlxlm.models.loading import load_model

FAMILIES = ["llama", "gemma2", "gemma3", "mistral", "bloom", "gpt2", "glm", "falcon"]


def speculations(model):
    return [
        Speculation(prompt_lookup=3, num_draft_tokens=4),
        Speculation(early_exit=1, num_draft_tokens=2),
        Speculation(draft_model=model, num_draft_tokens=5),
    ]


def sampler(sampling, prompt, words):
    return sampling.sampler(list(prompt), words)


def plain(model, prompt, count, sampling, words):
    from mlxlm.generation.decoding import decode

    made = decode(model, list(prompt), model.make_cache(), sampler(sampling, prompt, words), count)
    return [choice.token for choice in made]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_stay_what_they_are(loaded_models, name):
    model = loaded_models[name]
    words = model.config.embeddings.vocab_size
    prompt = [5, 6, 7, 8, 5, 6, 7, 9, 5, 6]
    penalized = [Sampling(repetition_penalty=1.3, logit_bias={7: 1.5})] if name in ("llama", "mistral") else []
    for sampling in (*penalized, Sampling()):
        wanted = plain(model, prompt, 16, sampling, words)
        for speculation in speculations(model):
            cache = model.make_cache()
            made = speculative_decode(
                model, prompt, cache, sampler(sampling, prompt, words), 16, speculation, likelihoods=0
            )
            choices = list(made)
            assert [choice.token for choice in choices] == wanted, speculation
            assert cache.length == len(prompt) + 15
    logits = np.array(model(mx.array([[*prompt, *wanted]]))[0, len(prompt) - 1 : -1], dtype=np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose([choice.log_probability for choice in choices], scores[np.arange(16), wanted], atol=2e-4)


def test_guesses_of_the_model_itself_are_all_kept(loaded_models):
    model, passes = loaded_models["llama"], []
    original = type(model).__call__
    twin = load_twin(model)

    class Counted(type(model)):
        def __call__(self, tokens, **keywords):
            passes.append(tokens.shape[1])
            return original(self, tokens, **keywords)

    twin.__class__ = Counted
    made = speculative_decode(
        twin,
        [5, 6, 7],
        twin.make_cache(),
        sampler(Sampling(), [5], 67),
        13,
        Speculation(draft_model=model, num_draft_tokens=5),
    )
    assert len(list(made)) == 13
    assert passes == [6, 6]  # one token by the prompt, then six a pass


def load_twin(model):
    return load_model(model.source.path)


def chi_square(counts, probabilities):
    """The statistic of counts against probabilities, and its expectation."""
    total = sum(counts)
    expected = total * np.asarray(probabilities)
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum()), len(counts) - 1


@pytest.mark.parametrize("certain", [False, True])
def test_what_is_kept_is_distributed_as_the_model_says(certain):
    """By the definition: the first token follows p0, and the one after a kept guess follows p1, whatever q is."""
    words, rounds = 5, 1000
    drawn = np.random.default_rng(1)
    logits = mx.array(drawn.standard_normal((3, words)), dtype=mx.float32)
    draft = mx.array(1.5 * drawn.standard_normal((2, words)), dtype=mx.float32)
    p, q = (np.array(mx.softmax(a, axis=-1)) for a in (logits, draft))
    one = sampler(Sampling(temperature=1.0, seed=3), [0], words)
    first, second = Counter(), Counter()
    guesses = np.stack([drawn.choice(words, rounds, p=row / row.sum()) for row in q.astype(np.float64)], axis=1)
    for guess in guesses if not certain else [[1, 3]] * rounds:
        kept = _verified(logits, mx.array(guess, dtype=mx.int32), None if certain else mx.array(q), one).tolist()
        first[kept[0]] += 1
        if len(kept) > 1:
            assert kept[0] == guess[0]
            second[kept[1]] += 1
    for counts, wanted in ((first, p[0]), (second, p[1])):
        statistic, freedom = chi_square([counts[token] for token in range(words)], wanted)
        assert statistic < freedom + 4 * np.sqrt(2 * freedom), (statistic, freedom)
    assert 0 < sum(second.values()) < rounds


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_whole_answers_are_distributed_as_without(loaded_models, number):
    model, words, prompt, rounds = loaded_models["llama"], 6, [5, 1, 2, 5, 1], 200
    speculation = speculations(model)[number]
    sampling = Sampling(temperature=1.2, top_k=5)
    pairs = Counter()
    for seed in range(rounds):
        one = sampler(Sampling(temperature=1.2, top_k=5, seed=seed), prompt, words)
        made = speculative_decode(model, prompt, model.make_cache(), one, 3, speculation)
        pairs[tuple(choice.token for choice in made)[1:]] += 1

    def after(tokens):
        scores = sampler(sampling, prompt, words).filtered(model(mx.array([tokens]))[0, -1:, :words])
        return np.array(mx.softmax(scores, axis=-1)[0], dtype=np.float64)

    start = after(prompt)
    wanted = np.zeros((words, words))
    for token in range(words):
        following = after([*prompt, token])
        for other in range(words):
            wanted[other] += start[token] * following[other] * after([*prompt, token, other])
    likely = [(i, j) for i in range(words) for j in range(words) if wanted[i, j] * rounds > 5]
    counts, expected = [pairs[pair] for pair in likely], [wanted[pair] for pair in likely]
    counts.append(rounds - sum(counts))
    expected.append(1 - sum(expected))
    statistic, freedom = chi_square(counts, expected)
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), (statistic, freedom)


def test_the_cache_goes_on_where_the_answer_was_given_up(loaded_models):
    model, prompt = loaded_models["gemma2"], [5, 6, 7, 8, 5, 6, 7]
    wanted = plain(model, prompt, 20, Sampling(), 67)
    for speculation in speculations(model):
        for stop in (1, 2, 3, 5, 8):
            cache = model.make_cache()
            made = speculative_decode(model, prompt, cache, sampler(Sampling(), prompt, 67), 20, speculation)
            tokens = [choice.token for choice in islice(made, stop)]
            made.close()
            assert tokens == wanted[:stop]
            assert len(prompt) <= cache.length <= len(prompt) + stop
            held = (prompt + tokens)[: cache.length]
            logits = model(mx.array([[9]]), cache=cache)
            whole = model(mx.array([[*held, 9]]))
            np.testing.assert_allclose(np.array(logits[0, -1]), np.array(whole[0, -1]), atol=2e-4)


def test_the_longest_run_counts_and_then_the_latest_place():
    lookup = PromptLookup(2)
    text = [1, 2, 3, 9, 2, 4, 1, 2]
    assert lookup.propose(text, 3, None).tokens.tolist() == [3, 9, 2]
    assert lookup.propose([*text, 9], 3, None).tokens.tolist() == [2, 4, 1]
    assert lookup.propose([*text, 9, 8], 3, None) is None


def test_text_comes_out_the_same(tiny):
    model, tokenizer = tiny
    options = {"max_tokens": 20, "logit_bias": dict.fromkeys(tokenizer.stop_ids, -1e9)}
    wanted = mlxlm.generate(model, tokenizer, "Hello, Hello", **options)
    for speculation in speculations(model):
        assert mlxlm.generate(model, tokenizer, "Hello, Hello", speculation=speculation, **options) == wanted
    quantized = CacheSpec(bits=8, group_size=32)
    near = mlxlm.generate(
        model,
        tokenizer,
        "Hello, Hello",
        speculation=speculations(model)[0],
        cache=model.make_cache(quantized),
        **options,
    )
    assert len(near) == len(wanted)


def test_mistakes_are_one_clear_line(tiny, tiny_seq2seq, fixture_model):
    model, tokenizer = tiny
    for make, words in (
        (lambda: Speculation(), "exactly one"),
        (lambda: Speculation(prompt_lookup=2, early_exit=1), "exactly one"),
        (lambda: Speculation(prompt_lookup=0), "prompt_lookup is 0"),
        (lambda: Speculation(prompt_lookup=2, num_draft_tokens=0), "num_draft_tokens is 0"),
        (lambda: mlxlm.generate(model, tokenizer, "a", speculation=Speculation(early_exit=9)), "valid are 1 to"),
        (
            lambda: mlxlm.generate(
                model, tokenizer, "a", speculation=Speculation(draft_model=load_model(fixture_model("mpt")))
            ),
            "needs a decoder with the model's 67 words",
        ),
        (
            lambda: mlxlm.generate(
                model,
                tokenizer,
                "a",
                cache=model.make_cache(CacheSpec(max_length=20)),
                speculation=Speculation(prompt_lookup=2),
            ),
            "without --max-kv-size",
        ),
        (lambda: mlxlm.generate(*tiny_seq2seq, "a", speculation=Speculation(prompt_lookup=2)), "encoder-decoder"),
    ):
        with pytest.raises(UsageError, match=words):
            make()


def test_a_draft_that_runs_out_of_positions_stops_guessing(loaded_models):
    draft = DraftModel(loaded_models["gpt2"])
    limit = draft.model.config.max_length
    one = sampler(Sampling(), [5], 10)
    assert draft.propose([5] * (limit - 2), 5, one).tokens.shape == (2,)
    assert draft.propose([5] * limit, 5, one) is None
