"""The engine: many callers at once get what each would get alone, and nothing stays behind."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import PromptError, SamplingError, UsageError, WeightsError
from mlxlm.generation import Engine, EngineBusyError, Request, Sampling, generate_tokens
from mlxlm.models.loading import load_model


def prompt(number, length=None):
    drawn = np.random.default_rng(number)
    return tuple(drawn.integers(5, 67, length or int(drawn.integers(1, 25))).tolist())


@pytest.fixture
def engine(loaded_models):
    with Engine(loaded_models["llama"], 67, max_rows=4, chunk=8) as engine:
        yield engine


def test_callers_get_what_they_would_get_alone(loaded_models, engine):
    wanted = {n: generate_tokens(loaded_models["llama"], [prompt(n)], max_tokens=5 + n % 7)[0] for n in range(12)}
    found = {}

    def ask(numbers):
        for n in numbers:
            handle = engine.submit(Request(tokens=prompt(n), max_tokens=5 + n % 7))
            streamed = [choice.token for choice in handle]
            found[n] = handle.result(5)
            assert tuple(streamed) == found[n].tokens

    threads = [threading.Thread(target=ask, args=(range(first, 12, 4),)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == wanted
    figures = engine.statistics()
    assert (figures.requests, figures.cancelled, figures.failed) == (12, 0, 0)
    assert figures.generated_tokens == sum(len(one.tokens) for one in wanted.values())
    assert figures.prompt_tokens == sum(len(prompt(n)) for n in range(12))


def test_cancelled_requests_leave_nothing_behind(engine):
    handles = [engine.submit(Request(tokens=prompt(n, 20), max_tokens=40)) for n in range(9)]
    next(iter(handles[0]))
    for handle in handles[:8:2]:
        handle.cancel()
    cancelled = [handle.result(30) for handle in handles[:8:2]]
    assert {one.finish_reason for one in cancelled} == {"cancelled"}
    assert all(len(one.tokens) < 40 for one in cancelled)
    for handle in handles[1::2] + handles[8:]:
        assert handle.result(60).finish_reason == "length"
    handles[1].cancel()
    engine.submit(Request(tokens=(5,), max_tokens=1)).result(10)
    figures = _idle(engine)
    assert (figures.waiting, figures.active, figures.cache_bytes) == (0, 0, 0)
    assert (figures.requests, figures.cancelled) == (10, 4)


def _idle(engine):
    """Statistics once the engine has nothing left to do."""
    for _ in range(200):
        figures = engine.statistics()
        if not figures.active and not figures.waiting:
            return figures
        threading.Event().wait(0.01)
    raise AssertionError(figures)


def test_a_listener_hears_every_token_and_the_end(engine):
    heard, over = [], threading.Event()

    def listen(choice):
        heard.append(choice)
        if choice is None:
            over.set()

    handle = engine.submit(Request(tokens=(5, 6), max_tokens=4, likelihoods=2), listen)
    assert over.wait(30)
    assert [choice.token for choice in heard[:-1]] == list(handle.result().tokens)
    assert all(choice.log_probability <= 0 and len(choice.likeliest) == 2 for choice in heard[:-1])
    assert heard[-1] is None

    def broken(choice):
        raise RuntimeError("gone")

    assert engine.submit(Request(tokens=(5, 6), max_tokens=40), broken).result(30).finish_reason == "cancelled"
    assert engine.submit(Request(tokens=(5, 6), max_tokens=4)).result(30).tokens == handle.result().tokens


def test_a_full_queue_and_a_closed_engine_say_so(loaded_models):
    engine = Engine(loaded_models["llama"], 67, max_rows=1, max_waiting=1)
    handles, refused = [], None
    for _ in range(6):
        try:
            handles.append(engine.submit(Request(tokens=(5, 6), max_tokens=40)))
        except EngineBusyError as error:
            refused = str(error)
    assert "waiting already; try again later" in refused
    assert engine.close(timeout=60)
    assert all(handle.result().finish_reason == "length" for handle in handles)
    with pytest.raises(EngineBusyError, match="closed"):
        engine.submit(Request(tokens=(5,)))
    engine = Engine(loaded_models["llama"], 67)
    handle = engine.submit(Request(tokens=(5, 6), max_tokens=60))
    assert engine.close(finish=False, timeout=60)
    assert handle.result(1).finish_reason in ("cancelled", "length")


def test_bad_requests_are_refused_at_once(engine):
    for request, error in (
        (Request(tokens=()), PromptError),
        (Request(tokens=(99,)), PromptError),
        (Request(tokens=(5,) * 64), PromptError),
        (Request(tokens=(5,), sampling=Sampling(logit_bias={67: 1.0})), SamplingError),
    ):
        with pytest.raises(error):
            engine.submit(request)
    with pytest.raises(TimeoutError):
        engine.submit(Request(tokens=(5,), max_tokens=60)).result(0)
    with pytest.raises(UsageError, match="max_waiting"):
        Engine(engine._scheduler.model, 67, max_waiting=-1)


def test_damaged_weights_fail_the_request_and_not_the_engine(fixture_model):
    model = load_model(fixture_model("llama"))
    good = model.decoder.norm.weight
    with Engine(model, 67) as engine:
        damaged = good * float("nan")
        mx.eval(damaged)
        model.decoder.norm.weight = damaged
        with pytest.raises(WeightsError, match="not numbers"):
            engine.submit(Request(tokens=(5, 6))).result(30)
        model.decoder.norm.weight = good
        assert len(engine.submit(Request(tokens=(5, 6), max_tokens=3)).result(30).tokens) == 3
        assert engine.statistics().failed == 1
