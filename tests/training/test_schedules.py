"""Every schedule against its formula."""

from __future__ import annotations

import math

import pytest

from mlxlm.errors import UsageError
from mlxlm.training import TrainSettings, learning_rate_schedule

PEAK, STEPS, WARMUP = 0.01, 100, 20

FORMULAS = {
    "constant": lambda step: PEAK,
    "linear": lambda step: PEAK * (1 - 0.9 * (step - 20) / 80),
    "cosine": lambda step: PEAK * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 20) / 80))),
    "inverse-sqrt": lambda step: PEAK * math.sqrt(20 / step),
    "wsd": lambda step: PEAK if step < 70 else PEAK * (0.1 + 0.9 * (100 - step) / 30),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_rate_follows_its_formula_after_a_linear_warmup(name):
    rate = learning_rate_schedule(name, PEAK, STEPS, warmup=WARMUP, decay=30 if name == "wsd" else 0, floor=0.1)
    for step in range(WARMUP):
        assert rate(step) == pytest.approx(PEAK * (step + 1) / WARMUP)
    for step in range(WARMUP, STEPS + 1):
        assert rate(step) == pytest.approx(FORMULAS[name](step))


@pytest.mark.parametrize("name", FORMULAS)
def test_the_rate_is_never_zero_within_a_run_nor_above_its_peak(name):
    rate = learning_rate_schedule(name, PEAK, 7, warmup=2, decay=3)
    assert all(0 < rate(step) <= PEAK for step in range(7))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"warmup_steps": 11}, "warmup_steps is 11; expected 0 to 10"),
        ({"schedule": "wsd", "warmup_steps": 5, "decay_steps": 6}, "decay_steps is 6; expected 0 to 5"),
        ({"final_learning_rate": 2.0}, "expected 0 to 1"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense_are_refused(values, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        TrainSettings(steps=10, **values)


def test_settings_go_through_json():
    settings = TrainSettings(steps=10, betas=(0.9, 0.98))
    assert TrainSettings.from_json(settings.to_json()) == settings
