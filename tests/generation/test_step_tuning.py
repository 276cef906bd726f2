"""The fastest form of decoding steps is recorded for models of one size and followed, unless another is asked for."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxlm import runtime
from mlxlm.errors import UsageError
from mlxlm.generation import step_tuning
from mlxlm.generation.stepping import Stepping, default_stepping, tuning_key
from mlxlm.kernels.attention import tuning


@pytest.fixture(autouse=True)
def own_records(monkeypatch, tmp_path):
    monkeypatch.setenv("MLXLM_CACHE", str(tmp_path))
    monkeypatch.delenv("MLXLM_DECODE", raising=False)
    tuning.record.cache_clear()
    mx.disable_compile()
    yield
    mx.enable_compile()
    tuning.record.cache_clear()


def test_the_fastest_form_is_followed(tiny, monkeypatch):
    model, _ = tiny
    assert default_stepping(model) == Stepping()
    monkeypatch.setattr(step_tuning, "_seconds", lambda model, stepping, *_: {"whole": 0.001}.get(stepping.compiled, 1))
    lines = list(step_tuning.tune_steps(model, prompt=4, tokens=8))
    assert lines[2:] == ["decoding, whole: 1000 tokens/s", "decoding, fused: 1 tokens/s", "decoding: chosen: whole"]
    assert default_stepping(model) == Stepping(compiled="whole", ahead=2)
    assert default_stepping() == Stepping()
    monkeypatch.setenv("MLXLM_DECODE", "compiled=no,ahead=3")
    assert default_stepping(model) == Stepping(ahead=3)
    monkeypatch.setenv("MLXLM_DECODE", "compiled=hole")
    with pytest.raises(UsageError, match="MLXLM_DECODE: unknown way to compile 'hole'"):
        default_stepping(model)


def test_a_record_of_another_version_is_passed_over(tiny):
    model, _ = tiny
    tuning.write_record(runtime.backend(), disabled={}, choices={tuning_key(model): "compiled=by hand"})
    assert default_stepping(model) == Stepping()


def test_every_form_is_timed(tiny):
    model, _ = tiny
    lines = list(step_tuning.tune_steps(model, prompt=4, tokens=8))
    assert [line.split(":")[0] for line in lines[:4]] == [
        f"decoding, {form}" for form in ("no", "pieces", "whole", "fused")
    ]
    assert lines[-1].startswith("decoding: chosen: ")
    assert default_stepping(model).compiled in lines[-1]


def test_a_form_that_fails_is_not_chosen(tiny, monkeypatch):
    model, _ = tiny

    def seconds(model, stepping, *_):
        if stepping.compiled == "fused":
            raise RuntimeError("Unable to build metal library\n  from source")
        return {"pieces": 0.01}.get(stepping.compiled, 1)

    monkeypatch.setattr(step_tuning, "_seconds", seconds)
    lines = list(step_tuning.tune_steps(model, prompt=4, tokens=8))
    assert lines[-2:] == [
        "decoding, fused: failed (Unable to build metal library from source)", "decoding: chosen: pieces"
    ]  # fmt: skip
    assert default_stepping(model).compiled == "pieces"
