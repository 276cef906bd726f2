"""`mlxlm evaluate`: JSON on stdout, a table on stderr, one line for a mistake."""

from __future__ import annotations

import json

import pytest

import mlxlm
from mlxlm import peft
from mlxlm.generation import perplexity

ROWS = {
    "choices": [{"prompt": "the sky is", "choices": ["blue", "a cup"], "answer": 1}],
    "completion": [{"prompt": "hi", "completion": "there"}, {"prompt": "a", "completion": "b"}],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_perplexity_of_a_text_file(mlxlm_command, tiny_directory, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox\njumps.\n")
    arguments = ["evaluate", "--model", tiny_directory, "--data", file, "--max-seq-length", 8, "--stride", 3]
    status, out, err = mlxlm_command(*arguments)
    found = json.loads(out)
    expected = perplexity(*mlxlm.load(tiny_directory), [file.read_text()], window=8, stride=3)
    assert status == 0
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (found["format"], found["window"], found["stride"]) == ("text", 8, 3)
    assert "bits per byte" in err
    assert json.loads(mlxlm_command(*arguments, "--batch-size", 1)[1])["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_rows_are_measured_and_predictions_written(mlxlm_command, tiny_directory, tmp_path):
    for name, rows in ROWS.items():
        target = tmp_path / f"{name}.out"
        status, out, _ = mlxlm_command(
            "evaluate", "--model", tiny_directory, "--data", write(tmp_path / f"{name}.jsonl", rows),
            "--predictions", target, "--max-tokens", 3,
        )  # fmt: skip
        found = json.loads(out)
        assert (status, found["format"], found["rows"]) == (0, name, len(rows))
        written = [json.loads(line) for line in target.read_text().splitlines()]
        assert [{key: row[key] for key in row if key != "predicted"} for row in written] == rows
        assert all("predicted" in row for row in written)


def test_what_takes_long_is_told_with_its_limit(mlxlm_command, tiny_directory, tmp_path, monkeypatch):
    from mlxlm.cli import evaluate as command

    monkeypatch.setattr(command._Progress, "apart", 0.0)
    data = write(tmp_path / "rows.jsonl", ROWS["completion"] * 5)
    more = ["--batch-size", 1, "--columns", "completion=completion"]
    status, out, err = mlxlm_command("evaluate", "--model", tiny_directory, "--data", data, *more)
    assert status == 0, err
    longest = json.loads(out)["max_tokens"] - 16
    assert f"10 answers to generate, of at most {longest + 16} tokens (the longest right one has {longest})" in err
    assert err.index("10 right answers to score") < err.index("1 of 10 done") < err.index("10 answers to generate")
    assert "8 of 10 done" in err.split("answers to generate")[1]
    status, out, err = mlxlm_command("evaluate", "--model", tiny_directory, "--data", data, "--no-generate")
    assert (status, "to generate" in err, "exact_match" in out) == (0, False, False)
    (tmp_path / "a.txt").write_text("a long text " * 20)
    more = ["--max-seq-length", 8, "--batch-size", 2]
    status, out, err = mlxlm_command("evaluate", "--model", tiny_directory, "--data", tmp_path / "a.txt", *more)
    assert status == 0, err
    assert "windows of 8 tokens, of texts 1 to 1 of 1" in err
    assert "2 of " in err
    status, _, err = mlxlm_command("evaluate", "--data", tmp_path / "a.txt", "--columns", "text=body")
    assert (status, "--columns is for rows" in err) == (2, True)


def test_an_adapter_is_measured(mlxlm_command, tiny_directory, tmp_path):
    import mlx.core as mx
    from mlx.utils import tree_map

    model, _ = mlxlm.load(tiny_directory)
    peft.apply(model, peft.Lora(rank=2))
    model.update(tree_map(lambda a: a + 0.3 * mx.random.normal(a.shape), model.trainable_parameters()))
    peft.save_adapter(model, tmp_path / "adapter")
    data = write(tmp_path / "rows.jsonl", ROWS["completion"])
    arguments = ["evaluate", "--model", tiny_directory, "--data", data, "--no-generate"]
    bare = json.loads(mlxlm_command(*arguments)[1])
    adapted = json.loads(mlxlm_command(*arguments, "--adapter-path", tmp_path / "adapter")[1])
    assert "exact_match" not in bare
    assert abs(adapted["loss"] - bare["loss"]) > 1e-3


def test_a_folder_has_splits_and_a_limit_takes_the_first_rows(mlxlm_command, tiny_directory, tmp_path):
    write(tmp_path / "train.jsonl", ROWS["completion"])
    write(tmp_path / "test.jsonl", ROWS["choices"])
    arguments = ["evaluate", "--model", tiny_directory, "--data", tmp_path, "--no-generate"]
    assert json.loads(mlxlm_command(*arguments)[1])["format"] == "choices"
    found = json.loads(mlxlm_command(*arguments, "--split", "train", "--limit", 1)[1])
    assert (found["format"], found["rows"]) == ("completion", 1)
    status, out, err = mlxlm_command(*arguments, "--split", "trian")
    assert (status, out) == (2, "")
    assert "did you mean 'train'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --data or --tasks"),
        (["--data", "a", "--tasks", "b"], "one of both"),
        (["--data", "nowhere"], "no file and no folder"),
        (["--data", "DATA", "--split", "test"], "--data is a file"),
        (["--data", "DATA", "--limit", "0"], "--limit is 0"),
        (["--data", "DATA", "--batch-size", "0"], "batch_size is 0"),
        (["--data", "DATA", "--normalize", "byte"], "did you mean 'bytes'"),
        (["--data", "TEXT", "--stride", "0"], "stride is 0"),
        (["--data", "TEXT", "--predictions", "out.jsonl"], "not for text"),
        (["--data", "DATA", "--predictions", "FOLDER"], "no file that can be written"),
        (["--tasks", "toy", "--stride", "3"], "--stride is for --data"),
        (["--data", "EMPTY"], "has no rows"),
        (["--data", "BLANK"], "is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_one_line_and_status_2(arguments, message, mlxlm_command, tiny_directory, tmp_path):
    named = {
        "DATA": write(tmp_path / "rows.jsonl", ROWS["completion"]),
        "TEXT": write(tmp_path / "text.jsonl", [{"text": "abc"}]),
        "EMPTY": write(tmp_path / "empty.jsonl", []),
        "BLANK": tmp_path / "blank.txt",
        "FOLDER": tmp_path,
    }
    named["BLANK"].write_text("\n")
    given = [named.get(argument, argument) for argument in arguments]
    status, out, err = mlxlm_command("evaluate", "--model", tiny_directory, *given)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
