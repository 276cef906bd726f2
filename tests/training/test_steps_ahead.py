"""The next step is begun while a step is computed: the run stays what it is, wherever it is stopped."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.training import Reporter, Trainer, TrainSettings, WordLoss
from mlxlm.training.step import Step

sys.path.insert(0, str(Path(__file__).parent))
from training_runs import Rows, Valid, same, tiny_model, weights_of

STEPS = 9


@pytest.fixture(autouse=True)
def not_compiled():
    """Steps that are told to compile, which are begun early, without the time that compiling takes."""
    mx.disable_compile()
    yield
    mx.enable_compile()


class Order(Reporter):
    """What came when: "begun" and "reported"."""

    def __init__(self, monkeypatch):
        self.events, call = [], Step.__call__
        monkeypatch.setattr(Step, "__call__", lambda *given: (self.events.append("begun"), call(*given))[1])

    def on_metrics(self, metrics):
        self.events.append("reported")


def run(folder=None, *, until=None, reporters=(), steps=STEPS, batches=None, **settings):
    options = {"learning_rate": 3e-3, "report_every": 1, "compile": True, **settings}
    model = tiny_model()
    trainer = Trainer(
        model, WordLoss(), Rows(batches), TrainSettings(steps=steps, **options), folder, reporters=reporters,
        valid=Valid if options.get("evaluate_every") else None,
    )  # fmt: skip
    return trainer.run(resume=folder is not None, until=until), weights_of(model), trainer


def test_a_step_is_begun_before_the_one_before_it_is_reported(monkeypatch):
    order = Order(monkeypatch)
    run(reporters=[order], steps=4)
    assert order.events == [
        "begun",
        "begun",
        "reported",
        "begun",
        "reported",
        "begun",
        "reported",
        "reported",
    ]


@pytest.mark.parametrize("room", [True, False])
def test_it_is_launched_early_only_where_there_is_room_for_two(room, monkeypatch):
    """So that a run that is held to its plan takes no more than that."""
    order, launch, known = Order(monkeypatch), Trainer._launch, []

    def launched(trainer, begun):
        if not any(begun is one for one in known):
            known.append(begun)
            order.events.append("launched")
        launch(trainer, begun)

    monkeypatch.setattr(Trainer, "_launch", launched)
    before = mx.set_memory_limit(2**50 if room else 1)
    try:
        run(reporters=[order], steps=3)
    finally:
        mx.set_memory_limit(before)
    early = ["begun", "launched", "begun", "launched", "reported", "begun", "launched", "reported", "reported"]
    late = ["begun", "launched", "begun", "reported", "launched", "begun", "reported", "launched", "reported"]
    assert order.events == (early if room else late)


@pytest.mark.parametrize(
    "settings", [{"save_every": 1}, {"evaluate_every": 1}, {"accumulation": 2}], ids=["saved", "evaluated", "sums"]
)
def test_none_is_begun_where_the_weights_are_needed_in_between(settings, monkeypatch, tmp_path):
    order = Order(monkeypatch)
    run(tmp_path, reporters=[order], steps=3, **settings)
    assert order.events == ["begun", "reported"] * 3


def test_the_run_is_the_same_one(tmp_path):
    whole, expected, _ = run()
    assert same(run(tmp_path / "each", save_every=1)[1], expected)
    assert same(run(tmp_path / "some", save_every=4)[1], expected)
    run(tmp_path / "halves", until=4)
    result, weights, _ = run(tmp_path / "halves")
    assert same(weights, expected)
    assert (result.step, result.reason, result.loss) == (whole.step, "done", pytest.approx(whole.loss, rel=1e-6))


def test_data_that_ends_ends_the_run():
    result, _, trainer = run(batches=5)
    assert (result.step, result.reason, trainer.progress.tokens) == (5, "data", result.tokens)


@pytest.mark.parametrize("at", [1, 4])
def test_a_signal_ends_it_after_the_step_that_is_begun_and_it_goes_on_from_there(at, tmp_path):
    class Stop(Reporter):
        def on_metrics(self, metrics):
            if metrics["step"] == at:
                os.kill(os.getpid(), signal.SIGTERM)

    result, _, trainer = run(tmp_path, reporters=[Stop()])
    assert (result.reason, result.step) == ("SIGTERM", at + 1)
    assert trainer.checkpoints.steps() == [at + 1]
    assert same(run(tmp_path)[1], run()[1])
    assert not np.array_equal(*(next(iter(w.values())) for w in (run(until=at)[1], run()[1])))
