"""`mlxlm fuse`: the model that is written answers as the adapter did."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_map

import mlxlm
from mlxlm import peft
from mlxlm.models import Transformer, family_of

TOKENS = mx.array([[5, 9, 3, 17, 8, 4, 11]])


def with_adapter(directory, folder, method, noise=0.05):
    """Write an adapter for the model of a directory; the logits that it gives."""
    model, _ = mlxlm.load(directory)
    peft.apply(model, method)
    mx.random.seed(3)
    model.update(tree_map(lambda a: a + noise * mx.random.normal(a.shape), model.trainable_parameters()))
    peft.save_adapter(model, folder)
    return np.array(model(TOKENS))


@pytest.fixture
def quantized_directory(tiny_directory, tmp_path):
    """A checkpoint directory of a small decoder whose weights are quantized to 8 bits."""
    values = json.loads((tiny_directory / "config.json").read_text())
    values |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 4}
    model = Transformer(family_of(values).read_config(values))
    mx.random.seed(5)
    model.update(tree_map(lambda a: 0.2 * mx.random.normal(a.shape), model.parameters()))
    nn.quantize(model, group_size=32, bits=8)
    _, tokenizer = mlxlm.load(tiny_directory)
    mlxlm.save(model, tokenizer, tmp_path / "quantized", family="llama")
    return tmp_path / "quantized"


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_the_fused_model_answers_as_the_adapter(name, mlxlm_command, tiny_directory, tmp_path):
    expected = with_adapter(tiny_directory, tmp_path / "adapter", peft.METHODS[name]())
    bare = np.array(mlxlm.load(tiny_directory)[0](TOKENS))
    assert np.abs(expected - bare).max() > 1e-3
    status, out, err = mlxlm_command(
        "fuse", "--model", tiny_directory, "--adapter-path", tmp_path / "adapter", "--save-path", tmp_path / "fused"
    )
    assert (status, out) == (0, "")
    assert re.search(r"\d+ modules merged", err)
    model, tokenizer = mlxlm.load(tmp_path / "fused")
    assert np.abs(np.array(model(TOKENS)) - expected).max() < 2e-5
    assert tokenizer.encode("hi") == mlxlm.load(tiny_directory)[1].encode("hi")


def test_several_adapters_are_fused_with_their_weights(mlxlm_command, tiny_directory, tmp_path):
    folders = {tmp_path / "one": 0.5, tmp_path / "two": -2.0}
    for folder, method in zip(folders, (peft.Lora(rank=2), peft.Lora(rank=3, targets=("all-linear",))), strict=True):
        with_adapter(tiny_directory, folder, method)
    expected = np.array(mlxlm.load(tiny_directory, adapter=folders)[0](TOKENS))
    given = [part for folder, weight in folders.items() for part in ("--adapter-path", f"{folder}={weight}")]
    status, _, _ = mlxlm_command("fuse", "--model", tiny_directory, *given, "--output", tmp_path / "fused")
    assert status == 0
    assert np.abs(np.array(mlxlm.load(tmp_path / "fused")[0](TOKENS)) - expected).max() < 2e-5


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_of_a_quantized_model_all_becomes_floats_and_nothing_is_lost(
    name, mlxlm_command, quantized_directory, tmp_path
):
    expected = with_adapter(quantized_directory, tmp_path / "adapter", peft.METHODS[name]())
    status, _, err = mlxlm_command(
        "fuse", "--model", quantized_directory, "--adapter-path", tmp_path / "adapter", "--save-path", tmp_path / "out"
    )
    assert (status, "warning" in err) == (0, False)
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert np.abs(np.array(mlxlm.load(tmp_path / "out")[0](TOKENS)) - expected).max() < 1e-4


def test_bug_9_quantizing_again_says_what_it_loses(mlxlm_command, quantized_directory, tmp_path):
    arguments = ["fuse", "--model", quantized_directory, "--adapter-path", tmp_path / "adapter", "--requantize"]
    lost = []
    for noise in (0.002, 0.5):
        expected = with_adapter(quantized_directory, tmp_path / "adapter", peft.Lora(rank=2), noise)
        status, _, err = mlxlm_command(*arguments, "--save-path", tmp_path / "out")
        assert status == 0
        lost.append(float(re.search(r"lost ([\d.]+) of the adapter's change", err)[1]))
    assert lost[0] > 0.5  # a change far below a quantization step is gone
    assert lost[1] < 0.1
    assert "quantization" in json.loads((tmp_path / "out" / "config.json").read_text())
    fused = np.array(mlxlm.load(tmp_path / "out")[0](TOKENS))
    bare = np.array(mlxlm.load(quantized_directory)[0](TOKENS))
    assert np.abs(fused - expected).max() < 0.2 * np.abs(expected - bare).max()


def test_what_can_not_be_fused_is_told_and_nothing_is_written(mlxlm_command, tiny_directory, tmp_path):
    with_adapter(tiny_directory, tmp_path / "adapter", peft.PromptTuning(num_tokens=3))
    arguments = ["fuse", "--model", tiny_directory, "--save-path", tmp_path / "fused", "--adapter-path"]
    status, _, err = mlxlm_command(*arguments, tmp_path / "adapter")
    assert status == 2
    assert "can't be merged" in err
    status, _, err = mlxlm_command(*arguments, tmp_path / "nothing")
    assert status == 2
    assert "no such folder" in err
    assert not (tmp_path / "fused").exists()
