"""`mlxlm convert` as a person runs it."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlxlm.checkpoint import open_safetensors


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch):
    """Sources are computed by this package, whether transformers is installed or not."""
    monkeypatch.setattr("mlxlm.conversion.verification._with_transformers", lambda *arguments: None)


def test_floats_a_dry_run_and_a_second_time(mlxlm_command, tiny_directory, tmp_path):
    status, out, _ = mlxlm_command("convert", "--model", tiny_directory, "--dry-run")
    lines = out.splitlines()
    assert status == 0
    assert "model.norm.weight  36  float32  144  <- model.norm.weight" in lines
    assert len(lines) == len(open_safetensors(tiny_directory).tensors)
    output = tmp_path / "out"
    status, out, err = mlxlm_command(
        "convert", "--model", tiny_directory, "-o", output, "--dtype", "float16", "--verify"
    )
    assert (status, out.strip()) == (0, str(output))
    assert "100% of" in err
    assert "compared with" in err
    assert "Likeliest word the same" in (output / "README.md").read_text()
    assert json.loads((output / "config.json").read_text())["dtype"] == "float16"
    status, _, err = mlxlm_command("convert", "--model", tiny_directory, "-o", output)
    assert status == 2
    assert "is there already" in err


def test_the_ending_of_the_output_asks_for_gguf(mlxlm_command, tiny_directory, tmp_path):
    (tiny_directory / "tokenizer.json").unlink()
    (tiny_directory / "tokenizer_config.json").unlink()
    output = tmp_path / "tiny.gguf"
    status, out, _ = mlxlm_command("convert", "--model", tiny_directory, "-o", output, "--type", "F32", "--verify")
    assert (status, out.strip()) == (0, str(output))
    assert output.with_suffix(".md").exists()
    status, out, err = mlxlm_command("convert", "--model", output, "-o", tmp_path / "back")
    assert status == 0, err
    before, after = open_safetensors(tiny_directory).load(), open_safetensors(tmp_path / "back").load()
    assert all(mx.array_equal(after[name], array) for name, array in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output PATH is needed"),
        (["--to", "mxl", "-o", "x"], "'mxl' is no format; did you mean 'mlx'?"),
        (
            ["--to", "hf", "--bits", "4", "-o", "x"],
            "--bits asks for a quantized result, which is --to mlx",
        ),
        (["--bits", "7", "-o", "x"], "quantization bits is 7; valid in affine mode: 1, 2, 3, 4, 5, 6, 8"),
        (["--bits", "4", "--layer", "up_proj", "-o", "x"], "'up_proj' is not PATTERN=BITS"),
        (["--layer", "*.up_proj=four", "-o", "x"], "'four' is not BITS"),
        (["--recipe", "none.json", "-o", "x"], "none.json: no such file"),
        (["--bits", "4", "-o", "x"], "no module's rows divide into such groups"),
        (["--keep", "-o", "x"], "the source isn't quantized"),
        (["-o", "x.gguf", "--type", "Q9_9"], "not in 'Q9_9'"),
        (["-o", "x", "--type", "Q8_0"], "--type goes with GGUF"),
        (["-o", "x.gguf", "--dtype", "float16"], "--dtype goes with no GGUF file"),
        (["-o", "x", "--max-shard-size", "nan"], "--max-shard-size is nan"),
        (["-o", "x", "--max-shard-size", "0"], "--max-shard-size is 0"),
        (["-o", "x", "--upload", "me"], "'me' is no repository on the hub"),
        (["--method", "gtpq", "-o", "x"], "unknown method 'gtpq'"),
        (["-o", "x", "--dtype", "float12"], "dtype 'float12'"),
    ],
)
def test_mistakes_are_one_line(mlxlm_command, tiny_directory, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = mlxlm_command("convert", "--model", tiny_directory, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [tiny_directory.name]
