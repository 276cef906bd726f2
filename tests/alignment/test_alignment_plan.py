"""The memory plan of alignment: within 15% of what MLX measures, with the reference, pairs, texts and rollouts."""

from __future__ import annotations

import gc
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from alignment_runs import settings_for, write

from mlxlm import runtime
from mlxlm.alignment import plan as plans
from mlxlm.alignment import prepare
from mlxlm.models import save

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from training_runs import tiny_model

LETTERS = [*"abcdefgh "]
ROLLOUTS = {"prompts_per_iteration": 2, "answers_per_prompt": 4, "batch_size": 8, "max_tokens": 24, "reward": "regex:a"}
CASES = {
    "dpo-full": ("dpo", {"fine_tune_type": "full"}),
    "orpo-recomputed": ("orpo", {"recompute_layers": -1}),
    "reward-full": ("reward", {"fine_tune_type": "full"}),
    "grpo": ("grpo", ROLLOUTS),
    "grpo-full": ("grpo", {**ROLLOUTS, "fine_tune_type": "full"}),
    "grpo-recomputed": ("grpo", {**ROLLOUTS, "recompute_layers": -1}),
    "ppo-texts": ("ppo", {**ROLLOUTS, "answers_per_prompt": 1, "prompts_per_iteration": 8, "ptx_data": "texts"}),
}
FAST = ("dpo-full",)


@pytest.fixture
def model(tiny_directory, tmp_path):
    """A model large enough for its arrays to be what counts."""
    folder = tmp_path / "model"
    save(
        tiny_model(
            vocab_size=67, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            attention_dropout=0.0, max_position_embeddings=256,
        ), None, folder, family="llama",
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_directory / name, folder)
    return folder


def rows_of(count, *lengths):
    """Texts of these lengths, so many times, of letters."""
    rng = np.random.default_rng(0)
    return [["".join(rng.choice(LETTERS, length)) for length in lengths] for _ in range(count)]


def run_of(case, model, folder):
    """The run of a case, made ready."""
    method, changes = CASES[case]
    write(
        folder / "pairs",
        train=[dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows_of(6, 30, 60, 60)],
    )
    write(folder / "prompts", train=[{"prompt": row[0]} for row in rows_of(6, 60)])
    write(folder / "texts", train=[{"text": row[0]} for row in rows_of(8, 90)])
    changes = {**changes, **({"ptx_data": str(folder / "texts" / "train.jsonl")} if "ptx_data" in changes else {})}
    data = folder / ("prompts" if "reward" in changes else "pairs")
    settings = settings_for(method, model, data, folder / "out", **{
        "iters": 2, "batch_size": 4, "steps_per_eval": 0, "valid_fraction": 0.0, "samples": 0, "memory": "off",
        **changes,
    })  # fmt: skip
    return prepare(settings, say=lambda text: None)


@pytest.mark.skipif(runtime.backend() != "cpu", reason="GPUs run ahead, so peaks of small steps say nothing")
@pytest.mark.parametrize("case", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in CASES])
def test_the_plan_is_within_15_percent_of_the_measured_peak(case, model, tmp_path):
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    run = run_of(case, model, tmp_path)
    limit = mx.set_memory_limit(1)  # MLX then waits for each operation, so that the peak is that of the computation
    try:
        mx.reset_peak_memory()
        outcome = run.train()
    finally:
        mx.set_memory_limit(limit)
    assert run.plan.peak == pytest.approx(outcome.memory - before, rel=0.15)


def test_a_run_that_cannot_fit_is_refused_with_what_would(model, tmp_path, monkeypatch):
    run = run_of("dpo-full", model, tmp_path)
    sizes = plans.Sizes(length=94, answers=2)
    tuning = replace(run.settings.tuning, memory="check")
    settings = replace(run.settings, tuning=tuning)
    whole = plans.predict(run.model, settings, sizes).peak
    monkeypatch.setattr(plans.plans, "working_set", lambda: whole // 2)
    with pytest.raises(plans.plans.MemoryPlanError, match=r"--batch-size \d --grad-accumulation-steps \d .* would fit"):
        plans.planned(settings, run.model, sizes)
    chosen, plan = plans.planned(replace(settings, tuning=replace(tuning, memory="auto")), run.model, sizes)
    assert plan.peak <= whole // 2
    assert chosen.tuning.batch_size * chosen.tuning.grad_accumulation_steps == 4  # comparisons, of two rows each
    monkeypatch.setattr(plans.plans, "working_set", lambda: whole // 50)
    with pytest.raises(plans.plans.MemoryPlanError, match="even with one comparison or answer at a time"):
        plans.planned(settings, run.model, sizes)


def test_each_of_several_processes_has_its_share_of_the_rows(model, tmp_path):
    run, sizes = run_of("dpo-full", model, tmp_path), plans.Sizes(length=94, answers=2)
    halves = [plans.predict(run.model, run.settings, sizes, processes) for processes in (1, 2)]
    assert halves[1].activations == pytest.approx(halves[0].activations / 2, rel=0.02)
