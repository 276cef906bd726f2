"""The examples of alignment: each runs two steps, draws, and its rewards are those that a person would give."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from mlxlm.alignment import Answered
from mlxlm.alignment.rewards import reward_of

FOLDER = Path(__file__).parents[2] / "examples" / "alignment"
QUICK = {
    "arithmetic": ["--loss", "9", "--iters", "2", "--most", "6", "--prompts", "2"],
    "preference": ["--epochs", "1", "--iters", "2", "--rows", "40"],
    "length": ["--epochs", "1", "--iters", "2", "--prompts", "2"],
}


@pytest.fixture
def script(monkeypatch):
    """A function: name -> the script as a module, imported as if it were run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = (*QUICK, "report", "small_model")
    for name in names:
        sys.modules.pop(name, None)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", QUICK)
def test_every_example_runs_two_steps_and_draws(script, name, tmp_path, capsys):
    script(name).main(["--output", str(tmp_path), *QUICK[name]])
    said = capsys.readouterr().out
    assert "before" in said
    assert "2 steps in" in said
    assert (tmp_path / "base" / "config.json").is_file()
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", QUICK)
def test_no_prompt_that_is_measured_is_learned_from(script, name, tmp_path, monkeypatch):
    """Neither in the teaching nor in what follows; and the best weights are told by others again."""
    module, small_model = script(name), script("small_model")
    for way in ("taught", "taught_to"):
        monkeypatch.setattr(small_model, way, lambda *given, **options: None)
    monkeypatch.setattr(script("report"), "align", lambda *given, **options: None)
    module.main(["--output", str(tmp_path)])
    what = ("prompt", "chosen", "rejected") if name == "preference" else ("prompt",)

    def asked(folder, split):
        rows = (tmp_path / folder / f"{split}.jsonl").read_text().splitlines()
        return {tuple(json.loads(row).get(key) for key in what) for row in rows}

    folder = "pairs" if name == "preference" else "prompts"
    test, valid, train = (asked(folder, split) for split in ("test", "valid", "train"))
    assert min(len(test), len(valid)) >= 60
    assert not test & valid
    assert not (test | valid) & train
    if name != "preference":  # there the prompts are a few things, of which opinions differ
        assert not test & asked("taught", "train")


def test_held_out_prompts_are_never_learned_from(script):
    for name, rows in (
        ("arithmetic", script("arithmetic").sums(30, 0)),
        ("preference", script("preference").pairs(800, 0)),
    ):
        given = [tuple(row.values()) for row in rows]
        assert len(set(given)) == len(given), name
    length = script("length")
    assert {length.hash_of("red sun: 3 words"), length.hash_of("red sun: 5 words")} == {
        length.hash_of("red sun: 1 words")
    }


def test_rewards_of_the_examples(script):
    preference, length = script("preference"), script("length")
    told = {"it was good.": True, "it was not good.": False, "i never found it awful.": True, "it was.": None, "": None}
    assert {text: preference.is_kind(text) for text in told} == told
    assert all(
        preference.is_kind(row["chosen"]) and not preference.is_kind(row["rejected"]) for row in preference.pairs(99, 1)
    )
    prompt = "red sun: 4 words"
    answers = [
        Answered(prompt, " a b c d"),
        Answered(prompt, " a b"),
        Answered(prompt, ""),
        Answered(prompt, "a " * 4, finished=False),
    ]
    assert length.reward(answers) == pytest.approx([1, 1 / 3, 0, 0])
    assert reward_of("length:reward") is length.reward
