"""Answers made together are those made alone: every batch size, chunk size, and order of coming and going."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import PromptError, UsageError, WeightsError
from mlxlm.generation.batching import generate_tokens
from mlxlm.generation.requests import Request
from mlxlm.generation.sampling import Sampling
from mlxlm.generation.scheduler import Scheduler
from mlxlm.generation.stepping import Stepping
from mlxlm.generation.steps import make_steps
from mlxlm.layers import CacheSpec
from mlxlm.models.loading import load_model

FAMILIES = ["llama", "llama-dynamic", "gemma2", "gemma3", "mistral", "bloom", "gpt2", "glm", "falcon", "falcon-alibi"]
LENGTHS = [3, 17, 9, 1, 17, 12, 5]


def prompts(model):
    drawn = np.random.default_rng(0)
    return [drawn.integers(5, model.config.embeddings.vocab_size, n).tolist() for n in LENGTHS]


def alone(model, prompt, count):
    """The likeliest tokens one after another, with a plain cache."""
    steps = make_steps(model)
    logits, answer = steps.start([prompt]), []
    for _ in range(count):
        answer.append(mx.argmax(logits, axis=-1).item())
        logits = steps.step(mx.array([answer[-1]]))
    return tuple(answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_made_alone(loaded_models, name):
    model = loaded_models[name]
    limits = [6, 3, 9, 4, 1, 7, 5]
    wanted = [alone(model, prompt, count) for prompt, count in zip(prompts(model), limits, strict=True)]
    for batch_size, chunk in ((3, 512), (7, 4)):
        found = generate_tokens(model, prompts(model), max_tokens=limits, batch_size=batch_size, chunk=chunk)
        assert [one.tokens for one in found] == wanted, (batch_size, chunk)
        assert {one.finish_reason for one in found} == {"length"}


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 512), (4, 1), (2, 6)])
def test_every_size_gives_the_same(loaded_models, batch_size, chunk):
    model = loaded_models["gemma3"]
    wanted = generate_tokens(model, prompts(model), max_tokens=6, batch_size=7)
    assert generate_tokens(model, prompts(model), max_tokens=6, batch_size=batch_size, chunk=chunk) == wanted


def test_stop_tokens_end_a_row_and_are_part_of_it(loaded_models):
    model = loaded_models["llama"]
    whole = generate_tokens(model, prompts(model), max_tokens=12)
    stop = whole[2].tokens[4]
    for one, other in zip(
        whole, generate_tokens(model, prompts(model), max_tokens=12, stop_tokens=[stop]), strict=True
    ):
        if stop in one.tokens:
            assert other.tokens == one.tokens[: one.tokens.index(stop) + 1]
            assert (other.finish_reason, other.answer) == ("stop", other.tokens[:-1])
        else:
            assert other == one


def test_log_probabilities_are_those_of_the_whole_text(loaded_models):
    model = loaded_models["llama"]
    found = generate_tokens(
        model, prompts(model), max_tokens=6, likelihoods=3, sampling=Sampling(temperature=1.5, top_k=20, seed=3)
    )
    for prompt, one in zip(prompts(model), found, strict=True):
        logits = np.array(model(mx.array([[*prompt, *one.tokens[:-1]]]))[0, len(prompt) - 1 :], dtype=np.float64)
        scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        wanted = [row[token] for row, token in zip(scores, one.tokens, strict=True)]
        np.testing.assert_allclose(one.log_probabilities, wanted, atol=1e-4)
        for row, likeliest in zip(scores, one.likeliest, strict=True):
            assert [token for token, _ in likeliest] == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose([value for _, value in likeliest], np.sort(row)[::-1][:3], atol=1e-4)


def test_rows_may_want_more_or_less_to_be_known(loaded_models):
    model = loaded_models["llama"]
    scheduler = Scheduler(model, 67, max_rows=2)
    wanted = [0, None, 2, 1, None]
    rows = [
        scheduler.add(Request(tokens=tuple(prompt), max_tokens=4 + i, likelihoods=want))[0]
        for i, (prompt, want) in enumerate(zip(prompts(model), wanted, strict=False))
    ]
    found = {id(row): [] for row in rows}
    while scheduler.busy:
        for row, choice in scheduler.step():
            found[id(row)].append(choice)
    for row, want in zip(rows, wanted, strict=True):
        choices = found[id(row)]
        assert {choice.log_probability is None for choice in choices} == {want is None}
        assert {len(choice.likeliest) for choice in choices} == {want or 0}
        for choice in choices if want else []:
            assert choice.likeliest[0] == (choice.token, choice.log_probability)


def test_rows_draw_what_they_would_draw_alone(loaded_models):
    """Each row by its own options and seed, whoever stands beside it."""
    model, words = loaded_models["llama"], 67
    samplings = [
        Sampling(temperature=1.0, seed=1),
        Sampling(),
        Sampling(temperature=0.7, top_k=5, seed=2),
        Sampling(temperature=1.3, top_p=0.8, min_p=0.01, seed=3),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=0.9, top_k=9, logit_bias={7: 2.0, 9: -50.0}, seed=4),
    ]
    requests = [
        Request(tokens=tuple(prompt), max_tokens=9, sampling=sampling)
        for prompt, sampling in zip(prompts(model), samplings, strict=False)
    ]

    def answered(requests, **options):
        scheduler = Scheduler(model, words, **options)
        rows = [scheduler.add(request)[0] for request in requests]
        while scheduler.busy:
            scheduler.step()
        return [row.answer for row in rows]

    apart = [answered([request])[0] for request in requests]
    assert answered(requests) == apart
    assert answered(requests, max_rows=2) == apart
    assert len({tuple(answer) for answer in apart}) > 3


def test_several_answers_to_one_prompt_read_it_once(loaded_models):
    model = loaded_models["llama"]
    sampling = Sampling(temperature=1.0, seed=5)
    lone = [
        generate_tokens(model, [prompts(model)[1]], max_tokens=8, sampling=Sampling(temperature=1.0, seed=5 + i))[0]
        for i in range(5)
    ]
    together = generate_tokens(
        model, [prompts(model)[1]], max_tokens=8, samples=5, sampling=sampling, batch_size=3, chunk=6
    )
    assert together == lone
    scheduler = Scheduler(model, 67)
    rows = scheduler.add(Request(tokens=(5, 6, 7), max_tokens=4), copies=4)
    while scheduler.busy:
        scheduler.step()
    assert len({tuple(row.answer) for row in rows}) == 1


class Only:
    """Lets only some tokens come next, and remembers when it was asked."""

    def __init__(self, words, allowed):
        self.words, self.allowed, self.asked = words, allowed, []

    def __call__(self, answer):
        self.asked.append(list(answer))
        mask = np.full(self.words, -np.inf, dtype=np.float32)
        mask[self.allowed[len(answer)]] = 0
        return mx.array(mask)


def test_a_processor_sees_each_token_before_the_next(loaded_models):
    model = loaded_models["llama"]
    only = Only(67, [[8], [9, 10], [11], [12]])
    scheduler = Scheduler(model, 67)
    plain = scheduler.add(Request(tokens=(5, 6, 7), max_tokens=6))[0]
    bound = scheduler.add(Request(tokens=(9, 6), max_tokens=9, stop_tokens=frozenset([12]), processors=(only,)))[0]
    while scheduler.busy:
        scheduler.step()
    assert bound.answer[0] == 8
    assert bound.answer[1] in (9, 10)
    assert bound.answer[2:] == [11, 12]
    assert only.asked == [bound.answer[:i] for i in range(4)]
    assert tuple(plain.answer) == alone(model, [5, 6, 7], 6)


def test_rows_come_and_go_between_steps(loaded_models):
    model = loaded_models["gemma2"]
    wanted = [alone(model, prompt, 10) for prompt in prompts(model)]
    scheduler = Scheduler(model, 67, max_rows=4, chunk=5)
    rows = [scheduler.add(Request(tokens=tuple(prompts(model)[i]), max_tokens=10))[0] for i in (0, 1)]
    for _ in range(4):
        scheduler.step()
    rows += [scheduler.add(Request(tokens=tuple(prompts(model)[i]), max_tokens=10))[0] for i in (2, 3, 4, 5)]
    for _ in range(3):
        scheduler.step()
    scheduler.drop([rows[1], rows[5]])
    while scheduler.busy:
        scheduler.step()
    for i in (0, 2, 3, 4):
        assert tuple(rows[i].answer) == wanted[i]
    assert tuple(rows[1].answer) == wanted[1][: len(rows[1].answer)]
    assert len(rows[1].answer) < 10
    assert rows[5].answer == []
    assert scheduler.rows.cache.nbytes == 0


def test_a_short_prompt_does_not_wait_for_a_long_one(loaded_models):
    model = loaded_models["llama"]
    scheduler = Scheduler(model, 67, chunk=4)
    long = scheduler.add(Request(tokens=tuple([5] * 40), max_tokens=2))[0]
    short = scheduler.add(Request(tokens=(6, 7), max_tokens=2))[0]
    for _ in range(4):
        scheduler.step()
    assert len(short.answer) == 2
    assert long.answer == []


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("ahead", [2, 5])
def test_steps_launched_ahead_change_nothing(loaded_models, ahead, bound):
    """Whoever ends when, by a stop token or by length, with likelihoods or without, and beside rows that must wait."""
    model = loaded_models["gemma2"]
    stop = frozenset(alone(model, prompts(model)[3], 6)[-1:])

    def answered(ahead):
        scheduler = Scheduler(model, 67, max_rows=3, chunk=9, stepping=Stepping(ahead=ahead))
        found = {}
        for number, (prompt, limit) in enumerate(zip(prompts(model), [1, 9, 4, 12, 2, 7, 30], strict=True)):
            sampling = Sampling(temperature=1.0, seed=number) if number % 3 == 1 else Sampling()
            only = (Only(67, [[20 + i, 40 + i] for i in range(7)]),) if bound and number == 5 else ()
            request = Request(
                tokens=tuple(prompt), max_tokens=limit, stop_tokens=stop, sampling=sampling, processors=only,
                likelihoods=2 if number == 2 else None,
            )  # fmt: skip
            found[id(scheduler.add(request, number)[0])] = []
        steps = 0
        while scheduler.busy:
            assert scheduler.active + scheduler.waiting > 0
            for row, choice in scheduler.step():
                found[id(row)].append(choice)
            steps += 1
            if steps == 6:  # one of those that are there, and one that waits
                kept = [row for row in scheduler.rows.unfinished if row.owner == 1]
                scheduler.drop(kept)
        assert scheduler.rows.cache.nbytes == 0
        return list(found.values())

    wanted, given = answered(1), answered(ahead)
    for number, (one, other) in enumerate(zip(wanted, given, strict=True)):
        shared = min(len(one), len(other)) if number == 1 else len(one)
        assert [(c.token, c.finish_reason) for c in one[:shared]] == [
            (c.token, c.finish_reason) for c in other[:shared]
        ]
        assert number == 1 or len(other) == shared
        assert [len(c.likeliest) for c in one[:shared]] == [2 if number == 2 else 0] * shared
    assert {choices[-1].finish_reason for choices in wanted[2:]} == {"stop", "length"}


def test_who_is_patient_reads_all_prompts_before_the_first_token(loaded_models):
    model, given = loaded_models["gemma2"], [[5, 6, 7], [8, 9, 10], [11, 12, 13], [20, 21, 22], [30] * 9]
    answers = []
    for patient in (False, True):
        scheduler = Scheduler(model, 67, chunk=6, max_rows=4, patient=patient)
        rows = [scheduler.add(Request(tokens=tuple(prompt), max_tokens=5))[0] for prompt in given]
        scheduler.step()
        # Two prompts a chunk: those of the second are a token behind where nobody waited for them.
        assert len(scheduler.rows) == (4 if patient else 2)
        scheduler.step()
        assert (scheduler.rows.cache.lengths is None) == patient
        while scheduler.busy:
            scheduler.step()
        answers.append([row.answer for row in rows])
    assert answers[0] == answers[1]


def test_caches_stay_within_the_limit(loaded_models):
    model = loaded_models["llama"]
    row = Scheduler(model, 67).row_bytes(30)
    specs = [layer.attention for layer in model.config.decoder.layers]
    assert row == sum(2 * spec.num_kv_heads * spec.head_dim for spec in specs) * 256 * 4
    scheduler = Scheduler(model, 67, cache_limit=2 * row, max_rows=8)
    rows = [scheduler.add(Request(tokens=(5, 6, 7), max_tokens=20))[0] for _ in range(5)]
    most = 0
    while scheduler.busy:
        scheduler.step()
        assert scheduler.rows.cache.nbytes <= 2 * row
        most = max(most, len(scheduler.rows.rows))
    assert most == 2
    assert {len(row.answer) for row in rows} == {20}
    with pytest.raises(UsageError, match="MB of cache, but the limit is"):
        Scheduler(model, 67, cache_limit=100).add(Request(tokens=(5,)))


@pytest.mark.parametrize("spec", [CacheSpec(ragged=True, bits=8, group_size=32)], ids=repr)
def test_a_quantized_batch_is_that_made_alone(loaded_models, spec):
    model = loaded_models["llama"]
    lone = [generate_tokens(model, [prompt], max_tokens=6, spec=spec)[0] for prompt in prompts(model)]
    assert generate_tokens(model, prompts(model), max_tokens=6, spec=spec) == lone


def test_mistakes_are_one_clear_line(loaded_models, fixture_model):
    model = loaded_models["llama"]
    for call, error, words in (
        (lambda: generate_tokens(model, [[]]), PromptError, "empty"),
        (lambda: generate_tokens(model, [[67]]), PromptError, "token id 67"),
        (lambda: generate_tokens(model, [[5] * 64]), PromptError, "context is 64"),
        (lambda: generate_tokens(model, [[5]], max_tokens=0), UsageError, "max_tokens is 0"),
        (lambda: generate_tokens(model, [[5]], max_tokens=[1, 2]), UsageError, "2 numbers of max_tokens for 1"),
        (lambda: generate_tokens(model, [[5]], samples=0), UsageError, "at least 1"),
        (lambda: Scheduler(model, 67, spec=CacheSpec()), UsageError, "ragged=True"),
        (lambda: Scheduler(model, 68), UsageError, "valid are 1 to 67"),
        (lambda: Scheduler(load_model(fixture_model("t5")), 40), UsageError, "encoder-decoder"),
        (lambda: Request(tokens=(5,), likelihoods=-1), UsageError, "likelihoods is -1"),
        (lambda: Scheduler(model, 67, max_rows=2).add(Request(tokens=(5,)), copies=3), UsageError, "3 answers"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_logits_that_are_no_numbers_are_an_error(fixture_model):
    model = load_model(fixture_model("llama"))
    model.decoder.norm.weight = model.decoder.norm.weight * float("nan")
    with pytest.raises(WeightsError, match="not numbers"):
        generate_tokens(model, [[5, 6]])
