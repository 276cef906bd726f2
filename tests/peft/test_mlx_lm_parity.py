"""The adapter folders of mlx-lm give the logits that mlx-lm computes, and mlx-lm reads what we write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxlm import peft
from mlxlm.models import load_model

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = sorted(path.parent.name for path in (FIXTURES / "mlx_lm").glob("*/expected.safetensors"))


def base_of(name):
    config = json.loads((FIXTURES / "mlx_lm" / name / "adapter_config.json").read_text())
    return load_model(FIXTURES / "models" / config["model"])


def gap(one, other):
    """Largest difference, relative to the largest logit if that is above 1."""
    one, other = np.array(one), np.array(other)
    return np.abs(one - other).max() / max(1.0, np.abs(other).max())


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_the_logits_of_mlx_lm_and_survives_being_written(name, tmp_path):
    expected = mx.load(str(FIXTURES / "mlx_lm" / name / "expected.safetensors"))
    model = base_of(name)
    assert gap(model(expected["tokens"]), expected["logits"]) > 1e-2  # else the adapter does nothing
    peft.load_adapter(model, FIXTURES / "mlx_lm" / name)
    assert gap(model(expected["tokens"]), expected["logits"]) < 1e-5
    peft.save_adapter(model, tmp_path, layout="mlx")
    assert gap(peft.load_adapter(base_of(name), tmp_path)(expected["tokens"]), expected["logits"]) < 1e-5


METHODS = {
    "lora": peft.Lora(rank=3, targets=("all-linear",), layers=(1,)),
    "lora-one": peft.Lora(rank=3, targets=("query", "down"), layers=(0,)),
    "dora": peft.Dora(rank=2, targets=("value", "up")),
    "full": peft.Full(),
    "last-layers": peft.LastLayers(num_layers=1),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "glm4"])
@pytest.mark.parametrize("name", METHODS)
def test_mlx_lm_reads_what_we_write(name, family, tmp_path):
    pytest.importorskip("mlx_lm", reason="needs the package mlx-lm")
    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))
    from make_mlx_lm_fixtures import base_model, load_adapters, logits_of

    model = load_model(FIXTURES / "models" / family)
    mx.random.seed(1)
    peft.apply(model, METHODS[name])
    model.update(tree_map(lambda array: array + 0.1 * mx.random.normal(array.shape), model.trainable_parameters()))
    peft.save_adapter(model, tmp_path, layout="mlx")
    tokens = mx.random.randint(3, 40, (2, 9))
    theirs = load_adapters(base_model(family), str(tmp_path)).eval()
    assert gap(logits_of(theirs, tokens), model(tokens)) < 1e-5
    assert gap(logits_of(base_model(family), tokens), model(tokens)) > 1e-3
