"""`mlxlm plan`: parts, limits, methods, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlxlm.models.loading import open_model

CONFIG = {
    "model_type": "llama", "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


@pytest.fixture
def plan(mlxlm_command, tmp_path):
    """Runs the command on a tiny config; returns its status, the parts in bytes, and its errors."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))

    def run(*flags):
        status, out, err = mlxlm_command("plan", "--model", path, "--max-seq-length", 256, "--limit-gb", 2, *flags)
        found = re.findall(r"^(\w[\w ]*?) +([\d.]+) (bytes|kB|MB|GB)", out, re.M)
        return status, {name: float(number) * UNITS[unit] for name, number, unit in found}, err

    return run


def test_every_flag_changes_its_part(plan):
    _, whole, err = plan()
    assert err == ""
    sizes = whole["weights"]
    assert plan("--ema")[1]["average"] == pytest.approx(sizes, rel=0.1)
    assert plan("--grad-accumulation-steps", 2)[1]["summed"] == pytest.approx(sizes, rel=0.1)
    assert plan("--dtype", "bfloat16")[1]["weights"] == pytest.approx(sizes / 2, rel=0.1)
    assert plan("--dtype", "bfloat16", "--no-master-weights")[1]["master weights"] == 0
    assert plan("--optimizer", "sgd")[1]["optimizer"] == pytest.approx(sizes, rel=0.1)
    assert plan("--recompute-layers", -1)[1]["activations"] < whole["activations"] / 4
    assert plan("--loss-chunk", 128)[1]["loss"] < whole["loss"] / 2
    lora = plan("--method", "lora", "--rank", 4, "--targets", "all-linear")[1]
    assert lora["gradients"] == pytest.approx(4 * 3 * 4 * (2 * 256 + 2 * 192 + 3 * 384), rel=0.05)
    assert plan("--method", "lora", "--rank", 4)[1]["gradients"] < lora["gradients"]
    packed = plan("--method", "qlora", "--rank", 4, "--quantized", 4)[1]
    assert packed["weights"] < 0.3 * sizes
    assert plan("--method", "prompt")[1]["gradients"] < lora["gradients"]


def test_a_mesh_shows_each_stage_and_what_is_sent(mlxlm_command, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    flags = ("plan", "--model", path, "--max-seq-length", 256, "--grad-accumulation-steps", 4)
    status, out, err = mlxlm_command(*flags, "--mesh", "pp=2,dp=2", "--zero", 2)
    assert (status, err) == (0, "")
    assert out.count("each of 2 processes") == 2
    assert re.search(r"batches in flight +2 ", out)
    assert re.search(r"sent: gradients +\d.*scatter over 2 of data", out)
    flags = (*flags, "--machines", 4, "--memory-per-machine", "64GB", "--link", "thunderbolt5")
    status, out, err = mlxlm_command(*flags)
    assert (status, err) == (0, "")
    assert "assumed: 10 TFLOP/s a machine; 10.0 GB/s and 20 us" in out
    assert re.search(r"^mesh +s/step.*\n(dp|tp|pp|sp)=", out, re.M)
    assert "not: pp=4: the model has 3 layers" in out
    status, out, err = mlxlm_command(*flags[:-4], "--memory-per-machine", "1MB")
    assert status == 2
    assert "no mesh of 4 machines does" in err


def test_a_step_that_cannot_fit_is_status_2_with_what_would(plan):
    status, parts, err = plan("--batch-size", 64, "--limit-gb", 0.1)
    assert (status, parts["peak"] > 1e8) == (2, True)
    assert re.search(r"--batch-size \d+ --grad-accumulation-steps \d+ --recompute-layers \d .*would fit", err)


def test_a_gguf_file_is_planned_by_its_header(mlxlm_command, tmp_path):
    source = Path(__file__).parent.parent / "fixtures" / "gguf" / "qwen3.gguf"
    values = dict(open_model(source).source.values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    flags = ("--max-seq-length", 16, "--limit-gb", 1)
    status, out, err = mlxlm_command("plan", "--model", source, *flags)
    assert (status, err) == (0, "")
    assert out == mlxlm_command("plan", "--model", tmp_path / "config.json", *flags)[1]


def test_the_largest_batch_of_an_endless_memory_is_found_at_once(plan):
    status, parts, _ = plan("--limit-gb", 1e9)  # a search that lists what attention does would take hours
    assert (status, parts["peak"] > 0) == (0, True)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--method", "lorra"), "did you mean 'lora'"),
        (("--method", "full", "--rank", 4), "--rank is for low-rank adapters"),
        (("--method", "lora", "--targets", "quarry"), "quarry"),
        (("--quantized", 7), "expected 2, 3, 4, 5, 6 or 8"),
        (("--limit-gb", 0), "--limit-gb is 0"),
        (("--dtype", "float8"), "unknown dtype"),
        (("--method", "qlora"), "quantized"),
        (("--mesh", "dq=2"), "no axis 'dq'"),
        (("--mesh", "tp=3"), "4 attention heads"),
        (("--mesh", ""), "not AXIS=NUMBER"),
        (("--mesh", "dp=2", "--zero", 5), "zero is 5"),
        (("--mesh", "pp=2", "--schedule", "zigzag"), "unknown schedule"),
        (("--zero", 3), "--zero goes with --mesh"),
        (("--machines", 0), "0 machines"),
        (("--machines", 2, "--mesh", "dp=2"), "leave out --mesh"),
        (("--machines", 2, "--link", "thunderbolt6"), "did you mean"),
        (("--machines", 2, "--memory-per-machine", "lots"), "such as 64GB"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_line(plan, flags, text):
    status, _, err = plan(*flags)
    assert status == 2
    assert text in err
    assert err.count("\n") == 1
