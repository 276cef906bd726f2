"""Quantized folders go to mlx-lm and come from it, with equal logits."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.conversion import MlxTarget, Recipe, convert, quantization
from mlxlm.models import load_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

# Without what mlx-lm 0.32 leaves out: biases of Gemma, other feed-forward widths than 4 times the model's. Four tokens,
# because it also ignores windows, which then make no difference.
FAMILIES = {
    "llama": {},
    "llama-tied": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"attention_bias": False},
    "gemma2": {},
    "phi3": {},
    "gpt_neox": {"intermediate_size": 512},
    "gpt2": {"n_inner": 512},
}
TOKENS = mx.array([[3, 9, 27, 31]])
MIXED = Recipe(default=quantization(4, 32), layers=(("*down_proj", quantization(8, 64)),))


@pytest.fixture(scope="module")
def mlx_lm_utils():
    pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    from mlx_lm import utils

    return utils


def same(ours: mx.array, theirs: mx.array) -> bool:
    ours, theirs = np.array(ours.astype(mx.float32)), np.array(theirs.astype(mx.float32))
    return bool(np.abs(ours - theirs).max() < 1e-4 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_mlx_lm_loads_what_we_quantize(name, wide, tmp_path, mlx_lm_utils):
    mixed = name.startswith(("llama", "qwen", "gemma"))
    convert(
        wide(name, **FAMILIES[name]),
        tmp_path / "out",
        MlxTarget(recipe=MIXED if mixed else Recipe(default=quantization(4, 32))),
    )
    theirs, _ = mlx_lm_utils.load_model(tmp_path / "out")
    assert same(load_model(tmp_path / "out", quantized=True)(TOKENS), theirs(TOKENS))


# mlx-lm doesn't read float GPT-2 folders whose names begin with "transformer.", as transformers writes them.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
def test_we_load_what_mlx_lm_quantizes(name, wide, tmp_path, mlx_lm_utils):
    model, config = mlx_lm_utils.load_model(wide(name, **FAMILIES[name]))
    model, config = mlx_lm_utils.quantize_model(model, config, group_size=32, bits=4)
    (tmp_path / "theirs").mkdir()
    mlx_lm_utils.save_model(tmp_path / "theirs", model)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    assert same(load_model(tmp_path / "theirs", quantized=True)(TOKENS), model(TOKENS))
