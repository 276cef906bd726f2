"""The attention benchmark compares like with like, and its table says what happened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmarks import attention as benchmark


@pytest.mark.parametrize("case", benchmark.CASES)
def test_all_sides_compute_the_same(case, monkeypatch):
    monkeypatch.setattr(mx, "compile", lambda function: function)
    monkeypatch.setattr(benchmark, "WINDOW", 7)
    monkeypatch.setattr(benchmark, "DOCUMENT", 5)
    shape = benchmark.arguments(["--quick", "--heads", "4", "--kv-heads", "2", "--head-dim", "8"])
    sides, planned = benchmark.passes(case, shape, 19)
    assert planned > 0
    found = {name: run() for name, run in sides.items() if not (name == "mx.fast" and case == "softcap")}
    for name, (outputs, gradients) in found.items():
        for got, expected in zip([*outputs, *gradients], [*found["ours"][0], *found["ours"][1]], strict=True):
            np.testing.assert_allclose(np.array(got), np.array(expected), atol=2e-5, err_msg=name)


def row(case="causal", length=1024, ours=None, theirs=None, by="mx.fast", **rest):
    sides = {}
    if ours:
        sides["ours"] = {"ms": ours[0], "gb": ours[1], "first": 2.0}
    if theirs:
        sides["theirs"] = {"ms": theirs[0], "gb": theirs[1], "first": 2.0, "by": by}
    return {"case": case, "length": length, "problem": "", "device": "mlx on a device", "planned": 0.8, **sides, **rest}


def test_the_table_shows_ratios_and_growth():
    lines = []
    rows = [
        row(ours=(20.0, 0.5), theirs=(10.0, 2.0)),
        row(length=2048, ours=(50.0, 1.0), theirs=(40.0, 8.0), by="plain"),
        row(length=4096, ours=(90.0, 2.1)),
        row(case="alibi", length=2048, problem="not run: the time limit"),
    ]
    benchmark.table(iter(rows), lines.append)
    assert lines[0] == "mlx on a device"
    cells = [" ".join(line.replace("|", " ").split()) for line in lines[2:6]]
    assert cells[0] == "causal 1024 10.0 20.0 0.50 2.000 0.500 4.00 0.800 - - 2.0"
    assert cells[1] == "causal 2048 40.0* 50.0 0.80 8.000* 1.000 8.00 0.800 4.00 2.00 2.0"
    assert cells[2] == "causal 4096 - 90.0 - - 2.100 - 0.800 - 2.10 2.0"
    assert cells[3].startswith("alibi 2048 - - - - - -")
    assert lines[6:] == ["alibi 2048: not run: the time limit"]
    assert len({len(line) for line in lines[1:6]}) == 1, "columns are aligned"


def test_rows_stop_at_the_time_limit():
    shape = benchmark.arguments(["--cases", "causal", "window", "--lengths", "64", "32", "--time-limit", "0"])
    rows = list(benchmark.all_rows(shape, [], lambda *_: pytest.fail("measured")))
    assert [(r["case"], r["length"]) for r in rows] == [("causal", 32), ("window", 32), ("causal", 64), ("window", 64)]
    assert all("time limit" in r["problem"] for r in rows)


def test_a_row_whose_process_ends_is_told_of():
    found = benchmark.run_row("causal", 8, ["--quick", "--heads", "3", "--kv-heads", "2"], 60)
    assert "ours" not in found
    assert "multiple of Hkv" in found["problem"]


@pytest.mark.slow
def test_one_command_prints_the_whole_table():
    command = [sys.executable, "tools/benchmarks/attention.py", "--quick", "--lengths", "128", "256"]
    done = subprocess.run(command, cwd=benchmark.ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 + 2 * len(benchmark.SHOWN)
    assert all("-" not in line.split("|")[1] for line in lines[3:])
