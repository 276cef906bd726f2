"""The examples of fine-tuning: each file runs two steps on a tiny model, the data are sound, methods are compared."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mlxlm import peft
from mlxlm.cli import main
from mlxlm.cli.options import shipped_model
from mlxlm.training.finetune import FinetuneSettings
from mlxlm.training.yaml_files import read_yaml

FOLDER = Path(__file__).parents[2] / "examples" / "finetune"
FILES = sorted(FOLDER.glob("*.yaml"))


def script(name):
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(f"finetune_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def snippets(tmp_path):
    """A small data folder of the task."""
    folder = tmp_path / "snippets"
    folder.mkdir()
    rows = script("make_data").rows(16, 0)
    for name, part in (("train", rows[:8]), ("valid", rows[8:12]), ("test", rows[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def test_there_is_one_example_a_method():
    assert {path.stem for path in FILES} == set(peft.METHODS)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_example_runs_two_steps(path, request, snippets, tmp_path, monkeypatch):
    values = {"model": shipped_model(), **read_yaml(path, "settings")}
    assert FinetuneSettings.from_json(values).method == path.stem
    base = request.getfixturevalue("tiny_bert_directory" if path.stem == "bitfit" else "tiny_directory")
    base = shipped_model() if path.stem == "qlora" else base  # the tiny one is too narrow for groups of 64 weights
    arguments = ["--model", base, "--data", snippets, "--adapter-path", tmp_path / "out", "--iters", 2]
    arguments += ["--samples", 0, "--steps-per-eval", 0, "--batch-size", 2 if path.stem == "qlora" else 4]
    if path.stem == "last-layers":
        arguments += ["--num-layers", 1]
    command = ["mlxlm", "finetune", "--config", path, *arguments]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit) as stop:
        main.run()
    assert not stop.value.code
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["method"], results["steps"], results["kind"]) == (path.stem, 2, "sequence")
    assert 0 <= results["test"]["accuracy"] <= 1


def test_the_rows_are_different_balanced_and_the_same_each_time():
    made = script("make_data")
    rows = made.rows(400, 3)
    assert rows == made.rows(400, 3)
    assert len({row["text"] for row in rows}) == 400
    counts = [sum(row["label"] == label for row in rows) for label in made.LINES]
    assert max(counts) - min(counts) <= 1
    names = {label: {name for row in rows if row["label"] == label for name in made.NAMES if name in row["text"]}
             for label in made.LINES}  # fmt: skip
    assert all(found == set(made.NAMES) for found in names.values())


def result(accuracy, loss, trainable):
    """What results.json has of a run."""
    test = {"accuracy": accuracy, "loss": loss}
    more = {"parameters": 10**7, "steps": 40, "seconds": 5.0, "peak_memory": 2e8}
    return {"test": test, "valid": {}, "trainable": trainable, **more}


def test_methods_are_compared_in_a_table_and_a_picture(tmp_path):
    compare = script("compare")
    found = {"ia3": result(0.5, 1.0, 10**3), "full": result(0.975, 0.2, 10**7), "lora": result(0.975, 0.1, 10**4)}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compare.table(found).splitlines()]
    assert lines[0][:3] == ["method", "right answers", "loss"]
    assert [line[0] for line in lines[2:]] == [
        "lora",
        "full",
        "ia3",
    ]  # the best first, and of equal ones the lower loss
    assert lines[2][1:] == ["97.5%", "0.1000", "10,000", "0.10%", "40", "5", "0.20"]
    pytest.importorskip("matplotlib")
    compare.draw(found, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_a_method_with_a_result_is_not_run_again_and_one_without_goes_on(tmp_path, monkeypatch):
    compare, ran = script("compare"), []

    def runs(command, **_):
        """Every run but that of ia3 ends with a result."""
        target = Path(command[command.index("--adapter-path") + 1])
        ran.append((target.name, "--resume" in command, command[-2:]))
        target.mkdir(exist_ok=True)
        if target.name != "ia3":
            (target / "results.json").write_text(json.dumps(result(1.0, 0.1, 10)))
        return type("Done", (), {"returncode": int(target.name == "ia3")})

    monkeypatch.setattr(compare.subprocess, "run", runs)
    monkeypatch.setattr(compare, "draw", lambda found, path: None)
    (tmp_path / "lora" / "checkpoints" / "step-00000005").mkdir(parents=True)
    words = ["--methods", "lora", "ia3", "bitfit", "--output", tmp_path, "--model", "bitfit=there", "--", "--iters", 9]
    for again in (False, True):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        compare.main()
        expected = [("ia3", False, ["--iters", "9"])]
        if not again:
            expected = [("lora", True, ["--iters", "9"]), *expected, ("bitfit", False, ["--iters", "9"])]
        assert ran == expected
        ran.clear()
    monkeypatch.setattr(sys, "argv", ["compare.py", "--model", "bitfit"])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert stop.value.code == 2
