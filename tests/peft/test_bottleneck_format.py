"""Bottleneck adapters under the names of the adapters library, which are written out here by hand."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm import peft
from mlxlm.errors import ConfigError, UsageError, WeightsError
from mlxlm.models import load_model

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
TENSORS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")

# By fixture: where the library keeps what is after attention, and after the feed-forward layer.
KEEPERS = {
    "bert": (
        [f"bert.encoder.layer.{n}.attention.output.adapters" for n in range(2)],
        [f"bert.encoder.layer.{n}.output.adapters" for n in range(2)],
    ),
    "llama": (
        [f"model.layers.{n}.attention_adapters.adapters" for n in range(2)],
        [f"model.layers.{n}.output_adapters.adapters" for n in range(2)],
    ),
    "gpt2": (
        [f"transformer.h.{n}.attention_adapters.adapters" for n in range(2)],
        [f"transformer.h.{n}.output_adapters.adapters" for n in range(2)],
    ),
    "t5": (
        [f"encoder.block.{n}.layer.0.adapters" for n in range(2)]
        + [f"decoder.block.{n}.layer.0.adapters" for n in range(3)],
        [f"encoder.block.{n}.layer.1.adapters" for n in range(2)]
        + [f"decoder.block.{n}.layer.2.adapters" for n in range(3)],
    ),
}
CONFIG = {
    "non_linearity": "relu", "reduction_factor": 6, "original_ln_before": False, "original_ln_after": True,
    "residual_before_ln": True, "ln_before": False, "ln_after": False, "mh_adapter": True, "output_adapter": True,
    "is_parallel": False, "scaling": 1.0, "leave_out": [], "init_weights": "bert", "dropout": 0.0,
}  # fmt: skip
PFEIFFER = {"mh_adapter": False, "original_ln_before": True}


def base(name):
    return load_model(MODELS / name)


def folder_of(path, keepers, dim, width, **changes):
    """A folder as the library writes it; returns the tensors."""
    rng = np.random.default_rng(1)
    shapes = dict(zip(TENSORS, ((width, dim), (width,), (dim, width), (dim,)), strict=True))
    tensors = {
        f"{keeper}.sst.{name}": rng.normal(size=shape).astype(np.float32) * 0.3
        for keeper in keepers
        for name, shape in shapes.items()
    }
    path.mkdir()
    mx.save_safetensors(str(path / "adapter.safetensors"), {key: mx.array(array) for key, array in tensors.items()})
    (path / "adapter_config.json").write_text(json.dumps({"config": {**CONFIG, **changes}, "name": "sst"}))
    return tensors


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", KEEPERS)
def test_the_names_are_those_of_the_library(family, kind, tmp_path):
    model = base(family)
    peft.apply(model, peft.METHODS[kind](reduction=6), name="sst")
    peft.save_adapter(model, tmp_path, layout="adapters")
    attention, output = KEEPERS[family]
    keepers = [*attention, *output] if kind == "houlsby" else output
    written = mx.load(str(tmp_path / "adapter.safetensors"))
    assert written.keys() == {f"{keeper}.sst.{name}" for keeper in keepers for name in TENSORS}
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["name"] == "sst"
    assert values["config"]["mh_adapter"] == (kind == "houlsby")
    assert values["config"]["original_ln_before"] == (kind == "pfeiffer")
    assert values["config"]["leave_out"] == []


@pytest.mark.parametrize("family", KEEPERS)
def test_a_folder_of_the_library_is_read_and_computes_its_formula(family, tmp_path):
    model = base(family)
    dim = model.config.dim
    tensors = folder_of(tmp_path / "library", [*KEEPERS[family][0], *KEEPERS[family][1]], dim, 5)
    peft.load_adapter(model, tmp_path / "library")
    stack = "encoder" if model.config.decoder is None else "decoder"
    place = getattr(model, stack).layers[1].feed_forward
    x = mx.random.normal((1, 3, dim))
    y = np.array(place.base(x), dtype=np.float64)
    keeper = KEEPERS[family][1][3 if family == "t5" else 1]
    down, down_bias, up, up_bias = (tensors[f"{keeper}.sst.{name}"].astype(np.float64) for name in TENSORS)
    expected = y + np.maximum(y @ down.T + down_bias, 0) @ up.T + up_bias
    assert np.abs(np.array(place(x)) - expected).max() < 1e-4
    peft.save_adapter(model, tmp_path / "again", layout="adapters", name="default")
    again = mx.load(str(tmp_path / "again" / "adapter.safetensors"))
    assert {key.replace(".default.", ".sst."): np.array(array).tolist() for key, array in again.items()} == {
        key: array.tolist() for key, array in tensors.items()
    }


def test_layers_left_out_have_no_adapter(tmp_path):
    _, output = KEEPERS["llama"]
    folder_of(tmp_path / "library", output[1:], 36, 6, leave_out=[0], **PFEIFFER)
    model = peft.load_adapter(base("llama"), tmp_path / "library")
    assert set(peft.content_of(model).content.added) == {"decoder.layers.1.feed_forward_residual"}


def test_layers_of_two_stacks_are_numbered_through(tmp_path):
    model = peft.apply(base("t5"), peft.Houlsby(layers=("encoder.1", "decoder.0"), cross_attention=True))
    peft.save_adapter(model, tmp_path, layout="adapters")
    values = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    assert (values["leave_out"], values["cross_adapter"]) == ([0, 3, 4], True)
    again = peft.load_adapter(base("t5"), tmp_path)
    assert set(peft.content_of(again).content.parts) == {
        "encoder.layers.1.attention", "encoder.layers.1.feed_forward",
        "decoder.layers.0.attention", "decoder.layers.0.cross_attention", "decoder.layers.0.feed_forward",
    }  # fmt: skip
    with pytest.raises(UsageError, match="single stack"):
        peft.apply(base("llama"), peft.Houlsby(cross_attention=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln_before": True}, "ln_before = True"),
        ({"use_gating": True}, "use_gating"),
        ({"non_linearity": "mish"}, "mish"),
        ({"scaling": "learned"}, "learned"),
        ({"reduction_factor": {"0": 2}}, "by layer"),
        ({"original_ln_before": True}, "original_ln_before"),
    ],
    ids=str,
)
def test_settings_that_change_the_result_are_named(changes, message, tmp_path):
    folder_of(tmp_path / "library", [*KEEPERS["llama"][0], *KEEPERS["llama"][1]], 36, 6, **changes)
    with pytest.raises(ConfigError, match=message):
        peft.load_adapter(base("llama"), tmp_path / "library")


def test_tensors_that_do_not_fit_are_named(tmp_path):
    attention, output = KEEPERS["llama"]
    folder_of(tmp_path / "short", [*attention, *output[:1]], 36, 6)
    with pytest.raises(WeightsError, match=r"lacks .*layers\.1\.output_adapters"):
        peft.load_adapter(base("llama"), tmp_path / "short")
    folder_of(tmp_path / "long", [*attention, *output, "model.layers.9.output_adapters.adapters"], 36, 6)
    with pytest.raises(WeightsError, match=r"layers\.9"):
        peft.load_adapter(base("llama"), tmp_path / "long")
    folder_of(tmp_path / "wide", [*attention, *output], 37, 6)
    with pytest.raises(WeightsError, match="expected"):
        peft.load_adapter(base("llama"), tmp_path / "wide")
