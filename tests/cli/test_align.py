"""`mlxlm align`: flags and settings are the same, a run from start to end, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mlxlm.alignment.settings import METHODS, OWN
from mlxlm.cli.align_flags import ALIGN_FLAGS

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from finetune_runs import completions, write

PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in completions(8)]
QUICK = ["--iters", 2, "--batch-size", 3, "--steps-per-eval", 0, "--answers", 2, "--samples", 1]


def arguments(model, data, output, *more):
    return ["align", "--model", model, "--data", data, "--adapter-path", output, *QUICK, *more]


def test_every_setting_of_alignment_has_a_flag():
    flags = {flag.setting for flag in ALIGN_FLAGS}
    assert set(OWN) <= flags
    assert {name for mine in METHODS.values() for name in mine} <= set(OWN)


def test_a_run_shows_numbers_before_and_after_and_generate_uses_it(mlxlm_command, tiny_directory, tmp_path):
    data, output = write(tmp_path / "data", train=PAIRS, valid=PAIRS[:3]), tmp_path / "out"
    status, out, err = mlxlm_command(*arguments(tiny_directory, data, output, "--method", "dpo", "--max-tokens", 4))
    assert status == 0, err
    for text in ("before", "after", "accuracy", "kl", "length", "saved in"):
        assert text in out
    assert json.loads((output / "results.json").read_text())["steps"] == 2
    status, *_ = mlxlm_command(
        "generate", "--model", tiny_directory, "--adapter-path", output, "--prompt", "the", "-m", 2
    )
    assert status == 0
    status, _, err = mlxlm_command(*arguments(tiny_directory, data, output, "--method", "dpo"))
    assert (status, "--resume it" in err) == (2, True)
    status, *_ = mlxlm_command("align", "--resume", "--adapter-path", output)
    assert status == 0


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "method is missing"),
        (["--method", "dpoo"], "did you mean 'dpo'"),
        (["--method", "dpo", "--gamma", 1], "dpo has no gamma"),
        (["--method", "dpo", "--beta", 0], "beta is 0.0"),
        (["--method", "grpo"], "reward is missing"),
        (["--method", "grpo", "--reward", "aritmetic"], "expected arithmetic"),
        (["--method", "grpo", "--reward", "arithmetic", "--answers-per-prompt", 1], "at least 2 answers"),
        (["--method", "grpo", "--reward", "arithmetic", "--max-tokens", 4], "no calculation"),
        (["--method", "grpo", "--reward", "arithmetic"], "max_tokens is 64, but"),
        (["--method", "kto"], "prompt, completion and label"),
        (["--method", "dpo", "--fine-tune-type", "lorra"], "did you mean 'lora'"),
        (["--method", "dpo", "--set", "rang=4"], "unknown key 'rang'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(mlxlm_command, tiny_directory, tmp_path, more, text):
    data, output = write(tmp_path / "data", train=PAIRS), tmp_path / "out"
    status, out, err = mlxlm_command(*arguments(tiny_directory, data, output, *more))
    assert (status, out) == (2, "")
    assert text in err
    assert err.splitlines()[-1].startswith("error: ")


def test_rows_of_preference_are_for_this_and_not_for_fine_tuning(mlxlm_command, tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=[{"prompt": "a"}] * 3)
    status, _, err = mlxlm_command(
        "finetune", "--model", tiny_directory, "--data", data, "--adapter-path", tmp_path / "o"
    )
    assert (status, "mlxlm align" in err) == (2, True)
