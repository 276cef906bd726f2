"""Sampling against plain numpy, one formula at a time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import SamplingError
from mlxlm.generation import Sampling
from mlxlm.generation.sampler import Sampler
from mlxlm.generation.sampling import keep_min_p, keep_top_k, keep_top_p, penalize

V = 23


def logits_of(seed):
    return np.random.default_rng(seed).normal(0, 2, V).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("k", [1, 2, 7, V - 1])
def test_top_k_keeps_the_k_largest(k):
    x = logits_of(k)
    kept = np.isfinite(np.array(keep_top_k(mx.array(x)[None], k))[0])
    assert set(np.flatnonzero(kept)) == set(np.argsort(-x)[:k])


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", range(4))
def test_top_p_keeps_the_smallest_set_with_that_probability(p, seed):
    x = logits_of(seed)
    kept = np.isfinite(np.array(keep_top_p(mx.array(x)[None], p))[0])
    order, probabilities = np.argsort(-x), softmax(x.astype(np.float64))
    size = next(n for n in range(1, V + 1) if probabilities[order[:n]].sum() >= p)
    assert set(np.flatnonzero(kept)) == set(order[:size])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_is_likely_enough_beside_the_best(p):
    x = logits_of(9)
    kept = np.isfinite(np.array(keep_min_p(mx.array(x)[None], p))[0])
    probabilities = softmax(x.astype(np.float64))
    assert (kept == (probabilities >= p * probabilities.max() * (1 - 1e-6))).all()


def test_the_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    x, seen = logits_of(3), np.arange(V) % 3 == 0
    expected = np.where(seen, np.where(x < 0, x * 1.3, x / 1.3), x)
    assert np.allclose(np.array(penalize(mx.array(x), mx.array(seen), 1.3)), expected)
    assert (expected[seen] < x[seen]).all()


def test_greedy_takes_the_likeliest_token_even_with_filters():
    x = logits_of(1)
    sampler = Sampling(top_k=3, top_p=0.2).sampler([0], V)
    assert sampler(mx.array(x)[None]).item() == x.argmax()


def test_samples_follow_the_tempered_distribution():
    x = logits_of(5)
    sampler = Sampling(temperature=1.7, top_k=5, seed=1).sampler([0], V)
    tokens = [sampler(mx.array(x)[None]) for _ in range(4000)]
    counts = np.bincount(np.array(mx.concatenate(tokens)), minlength=V) / len(tokens)
    best = np.argsort(-x)[:5]
    expected = np.zeros(V)
    expected[best] = softmax(x[best].astype(np.float64) / 1.7)
    assert counts[expected == 0].sum() == 0
    # five standard deviations of a binomial share
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(tokens)) + 1e-9).all()


def test_a_seed_fixes_the_tokens_and_another_changes_them():
    x = mx.array(logits_of(2))[None]

    def draw(seed):
        sampler = Sampling(temperature=2.0, seed=seed).sampler([0], V)
        return [sampler(x).item() for _ in range(30)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_a_logit_bias_can_force_or_forbid_a_token():
    x = logits_of(4)
    assert Sampling(logit_bias={11: 100.0}).sampler([0], V)(mx.array(x)[None]).item() == 11
    best = int(x.argmax())
    assert Sampling(logit_bias={best: -float("inf")}).sampler([0], V)(mx.array(x)[None]).item() == np.argsort(-x)[1]


def test_repetition_counts_prompt_and_answer():
    x = np.zeros(V, dtype=np.float32)
    x[4], x[5], x[6] = 3.0, 2.9, 2.8
    sampler = Sampling(repetition_penalty=2.0).sampler([4], V)
    assert [sampler(mx.array(x)[None]).item() for _ in range(3)] == [5, 6, 4]


def test_rows_beyond_the_vocabulary_are_never_chosen():
    x = np.zeros(V + 5, dtype=np.float32)
    x[V + 2] = 50.0
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=0), Sampling(repetition_penalty=1.5)):
        assert sampling.sampler([0], V)(mx.array(x)[None]).item() < V


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("repetition_penalty", 0.0),
        ("seed", -3),
    ],
)
def test_values_outside_their_domain_are_named(field, value):
    with pytest.raises(SamplingError, match=rf"{field} is {value}, but must be"):
        Sampling(**{field: value})


def test_a_bias_for_an_unknown_token_is_named():
    with pytest.raises(SamplingError, match=f"token {V}, but ids run from 0 to {V - 1}"):
        Sampling(logit_bias={V: 1.0}).sampler([0], V)


@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature):
    x = logits_of(8)
    sampler = Sampling(temperature=temperature, seed=0).sampler([0], V)
    assert {sampler(mx.array(x)[None]).item() for _ in range(20)} == {int(x.argmax())}


SEVERAL = [
    [Sampling()],
    [Sampling(temperature=0.8, seed=4)],
    [Sampling(temperature=0.8, seed=1), Sampling(), Sampling(temperature=1.2, top_k=5, top_p=0.9, seed=2)],
    [Sampling(repetition_penalty=1.3), Sampling(temperature=1.0, min_p=0.02, logit_bias={3: 1.5}, seed=3)],
]


def draws(samplings, *, compiled):
    """Four steps, two rows of which are left for the last two where there are more."""
    drawn = np.random.default_rng(0)
    sampler = Sampler(V, compiled=compiled)
    sampler.join(samplings, [[1, 2]] * len(samplings))
    found = []
    for step in range(4):
        if step == 2 and len(samplings) > 2:
            sampler.take([2, 0])
        rows = len(sampler.samplings)
        logits = mx.array(drawn.normal(0, 2, (rows, V + 3)), dtype=mx.float32)
        added = mx.array(drawn.normal(0, 1, (rows, V)), dtype=mx.float32) if step % 2 else None
        found.append(sampler(logits, added).tolist())
    return found


@pytest.fixture
def uncompiled():
    """On the CPU every fused kernel would be compiled by a C++ compiler; the operations are the same without."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("samplings", SEVERAL, ids=range(len(SEVERAL)))
def test_one_function_of_arrays_chooses_the_same(samplings, uncompiled):
    assert draws(samplings, compiled=True) == draws(samplings, compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize("samplings", SEVERAL, ids=range(len(SEVERAL)))
def test_and_so_it_does_compiled(samplings):
    assert draws(samplings, compiled=True) == draws(samplings, compiled=False)


def test_a_compiled_choice_says_what_is_no_number(uncompiled):
    sampler = Sampler(V, compiled=True)
    sampler.join([Sampling(), Sampling(temperature=1e-9)], [[1]] * 2)
    logits = np.zeros((2, V), dtype=np.float32)
    logits[0, 3], logits[1, 5] = 1, float("nan")
    assert sampler(mx.array(logits)).tolist() == [3, -1]
    assert sampler(mx.array(logits[::-1].copy())).tolist() == [-1, 3]
