"""The self-check passes where attention is right and names what is wrong."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxlm import runtime
from mlxlm.kernels.attention import selfcheck, tiled, tuning


@pytest.fixture(autouse=True)
def own_record(tmp_path, monkeypatch):
    """No test touches the user's record of this device."""
    monkeypatch.setenv("MLXLM_CACHE", str(tmp_path))
    tuning.record.cache_clear()
    yield
    tuning.record.cache_clear()


def test_every_case_passes_here():
    checks = list(selfcheck.run(("mlx", "tiled")))
    assert {check.implementation for check in checks} == {"mlx", "tiled"}
    assert [check for check in checks if check.problem] == []
    assert len(checks) > 1.5 * len(selfcheck.CASES)


@pytest.mark.parametrize("spoil", [lambda out: out * 1.01, lambda out: out * mx.nan], ids=["wrong", "nan"])
def test_a_wrong_kernel_is_found(monkeypatch, spoil):
    right = tiled.attention
    monkeypatch.setattr(tiled, "attention", lambda *a, **k: spoil(right(*a, **k)))
    (check,) = selfcheck.run(("tiled",), selfcheck.CASES[:1])
    assert "relative error" in check.problem


def test_a_kernel_that_does_not_compile_is_found(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("[metal::Device] Unable to build\nmetal library from source")

    monkeypatch.setattr(tiled, "attention", refuse)
    (check,) = selfcheck.run(("tiled",), selfcheck.CASES[:1])
    assert check.problem == "RuntimeError: [metal::Device] Unable to build metal library from source"


def test_failures_of_our_kernels_are_recorded_and_taken_back():
    failed = selfcheck.Check(case="causal", implementation="metal", error=0.3, problem="relative error 3.0e-01")
    tuning.write_record(runtime.backend(), disabled={"others": "wrong"}, choices={})
    assert selfcheck.record_failures([failed]) == "causal: relative error 3.0e-01"
    kept = {"metal": "causal: relative error 3.0e-01", "others": "wrong"}
    assert tuning.record(runtime.backend()).disabled == kept
    assert selfcheck.record_failures([]) == ""
    assert tuning.record(runtime.backend()).disabled == {"others": "wrong"}


def test_on_other_devices_than_metal_nothing_is_checked_at_loading(monkeypatch):
    monkeypatch.setattr(runtime, "backend", lambda: "cpu")
    monkeypatch.setattr(selfcheck, "run", lambda *_: pytest.fail("checked"))
    selfcheck.ensure_checked()


def test_on_metal_loading_checks_once(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "backend", lambda: "metal")
    calls = []
    failed = selfcheck.Check(case="causal", implementation="metal", error=None, problem="does not compile")
    monkeypatch.setattr(selfcheck, "run", lambda names: calls.append(names) or [failed])
    selfcheck.ensure_checked()
    selfcheck.ensure_checked()
    assert calls == [("metal",)]
    assert "switched off here: causal: does not compile" in capsys.readouterr().err


def test_tuning_records_the_fastest_of_a_shape():
    lines = list(selfcheck.tune(heads=2, kv_heads=1, head_dim=16, value_dim=16, dtype="float32", lengths=(40,)))
    assert [line.split(":")[0] for line in lines] == ["causal 40", "causal, segments 40"]
    choices = tuning.record(runtime.backend()).choices
    assert sorted(key.split()[-1] for key in choices) == ["causal", "causal+segments"]
    assert set(choices.values()) <= {"mlx", "tiled"}


@pytest.mark.parametrize(
    ("mask", "features"),
    [
        ({"causal": True, "window": 9}, ["causal+window", "causal+window+segments"]),
        ({"causal": False}, ["lengths", "plain"]),
        ({"causal": False, "modifiers": ("relative_bias",)}, ["lengths+relative_bias", "relative_bias"]),
        ({"modifiers": ("alibi", "softcap")}, ["causal+alibi+softcap", "causal+segments+alibi+softcap"]),
    ],
)
def test_tuning_times_the_masks_of_the_model(mask, features):
    shape = {"heads": 1, "kv_heads": 1, "head_dim": 8, "value_dim": 8, "dtype": "float32", "lengths": (40,)}
    assert len(list(selfcheck.tune(**shape, **mask))) == 2
    assert sorted(key.split()[-1] for key in tuning.record(runtime.backend()).choices) == features
