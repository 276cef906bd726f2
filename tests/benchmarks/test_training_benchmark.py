"""The training benchmark counts the steps after the warmup, and no more than it was asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmarks import training as benchmark


def test_the_warmup_and_what_comes_after_the_last_step_do_not_count(monkeypatch, capsys):
    moments = []
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: moments[-1]))
    moments.append(0.0)
    clock = benchmark.Clock({"mode": "lora", "who": "mlxlm", "warmup": 2, "steps": 3})
    for end in (90.0, 91.0, 92.0, 94.0, 95.0, 95.1):
        moments.append(end)
        clock.step()
    found = clock.figures()
    assert found["steps"] == [1000.0, 2000.0, 1000.0]
    assert (found["seconds"], found["fastest"]) == (1.0, 1.0)
    said = capsys.readouterr().err.splitlines()
    assert said[0].split(": ")[1].startswith("started")
    assert [line.split(": ")[1].split(",")[0] for line in said[1:]] == ["step 1", "step 2"]


def test_both_sides_get_the_same_rows():
    job = {"shape": "tiny", "batch_size": 2, "length": 9}
    assert benchmark.rows(job).shape == (2, 10)
    assert (benchmark.rows(job) == benchmark.rows(job)).all()
    assert benchmark.rows(job).max() < benchmark.SHAPES["tiny"]["vocab_size"]
