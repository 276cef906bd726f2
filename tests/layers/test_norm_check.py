"""The check of MLX's norms passes where they are right, and its formula is the derivative of the norm."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.layers import norm_check

SMALL = [case for case in norm_check.CASES if case.width == 5 and case.dtype == "float32"]


def test_every_case_passes_here():
    checks = list(norm_check.run())
    assert [check for check in checks if check.problem] == []
    assert {check.implementation for check in checks} == {"mx.fast.layer_norm", "mx.fast.rms_norm"}
    assert len(checks) == len(norm_check.CASES) >= 40


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.kind}-{case.bias}")
def test_the_formula_gives_derivatives(case):
    given = {n: np.array(a, dtype=np.float64) for n, a in norm_check._arrays(replace(case, rows=3)).items()}
    found = norm_check.formula(case.kind, given)
    for name in ("input", "weight", "bias")[: 3 if case.bias else 2]:
        for index in np.ndindex(given[name].shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = given[name].copy()
                moved[index] += step
                ends.append((norm_check.formula(case.kind, given | {name: moved})["output"] * given["cotangent"]).sum())
            slope = (ends[0] - ends[1]) / 2e-6
            assert found[f"gradient of the {name}"][index] == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize(("spoil", "where"), [
    (lambda out, x, w, b: out + 1e-3, "output"),
    (lambda out, x, w, b: out * mx.nan, "output: relative error nan"),
    (lambda out, x, w, b: out + (x - mx.stop_gradient(x)) * 0.01, "gradient of the input"),
    (lambda out, x, w, b: out + (b - mx.stop_gradient(b)) * 0.01, "gradient of the bias"),
])  # fmt: skip
def test_a_wrong_norm_is_found(monkeypatch, spoil, where):
    right = mx.fast.layer_norm

    def wrong(x, weight, bias, eps):
        return spoil(right(x, weight, bias, eps), x, weight, bias)

    monkeypatch.setattr(mx.fast, "layer_norm", wrong)
    (check,) = norm_check.run((norm_check.CASES[0],))
    assert where in check.problem


def test_an_error_that_comes_and_goes_is_found(monkeypatch):
    """As that of a race would."""
    right, calls = mx.fast.layer_norm, []

    def sometimes(x, weight, bias, eps):
        calls.append(1)
        return right(x, weight, bias, eps) * (1.01 if len(calls) == 3 else 1.0)

    monkeypatch.setattr(mx.fast, "layer_norm", sometimes)
    (check,) = norm_check.run((norm_check.CASES[0],))
    assert check.problem


def test_a_case_that_mlx_does_not_survive_is_named_and_the_last(monkeypatch):
    real = norm_check._results

    def results(case, given):
        if case.width == 300:
            raise RuntimeError("an illegal memory\naccess was encountered")
        return real(case, given)

    monkeypatch.setattr(norm_check, "_results", results)
    *good, last = norm_check.run()
    assert good
    assert not any(check.problem for check in good)
    assert last.case == "width 300 float16"
    assert last.problem == "an illegal memory access was encountered; the cases after it were left out"
