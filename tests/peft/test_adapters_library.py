"""Folders of the adapters library give the logits that the library computes, and it reads what we write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapter_fixtures import fixture_differences

from mlxlm import peft
from mlxlm.models import load_model

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = sorted(path.parent.name for path in (FIXTURES / "adapters").glob("*/expected.safetensors"))


def config_of(name):
    return json.loads((FIXTURES / "adapters" / name / "adapter_config.json").read_text())


def base_of(name):
    return load_model(FIXTURES / "models" / config_of(name)["model_name"])


def differences(model, name):
    return fixture_differences(model, FIXTURES / "adapters" / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_the_librarys_logits_and_survives_being_written(name, tmp_path):
    model = base_of(name)
    bare = differences(model, name)
    assert min(bare) > 1e-2  # else the adapter does nothing and the claim is empty
    peft.load_adapter(model, FIXTURES / "adapters" / name)
    assert max(differences(model, name)) < 1e-5
    for layout in ("adapters", "mlxlm"):
        peft.save_adapter(model, tmp_path / layout, layout=layout)
        assert max(differences(peft.load_adapter(base_of(name), tmp_path / layout), name)) < 1e-5
    written, given = (
        json.loads((folder / "adapter_config.json").read_text())["config"]
        for folder in (tmp_path / "adapters", FIXTURES / "adapters" / name)
    )
    assert {key: given[key] for key in written if key != "dropout"} == {
        key: written[key] for key in written if key != "dropout"
    }
    peft.unload(model)
    assert differences(model, name) == bare


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NAMES)
def test_the_library_reads_what_we_write(name, tmp_path):
    """Both folders are computed by the library in float64, so that all of the difference is in the files."""
    pytest.importorskip("adapters", reason="needs the package adapters, which pins transformers 4")
    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))
    from adapter_cases import logits_of
    from make_adapters_fixtures import with_adapter

    model = peft.load_adapter(base_of(name), FIXTURES / "adapters" / name)
    peft.save_adapter(model, tmp_path, layout="adapters")
    expected = mx.load(str(FIXTURES / "adapters" / name / "expected.safetensors"))
    inputs = {key: np.array(array) for key, array in expected.items() if key != "logits"}
    ours, theirs = (
        logits_of(with_adapter(config_of(name)["model_name"], folder).double(), inputs)
        for folder in (tmp_path, FIXTURES / "adapters" / name)
    )
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(theirs - np.array(expected["logits"])).max() < 5e-5
