"""The adapter files of Hugging Face PEFT give the logits that PEFT computes, and survive being written by us."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapter_fixtures import fixture_differences

from mlxlm.models import load_model
from mlxlm.peft import load_adapter, save_adapter, unload

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = sorted(path.parent.name for path in (FIXTURES / "peft").glob("*/expected.safetensors"))


def base_of(name):
    return load_model(FIXTURES / "models" / config_of(name)["base_model_name_or_path"])


def config_of(name):
    return json.loads((FIXTURES / "peft" / name / "adapter_config.json").read_text())


def differences(model, name):
    return fixture_differences(model, FIXTURES / "peft" / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_peft_folder_gives_the_logits_of_peft(name):
    model = base_of(name)
    bare = differences(model, name)
    load_adapter(model, FIXTURES / "peft" / name)
    assert max(differences(model, name)) < 1e-5
    assert min(bare) > 1e-3  # else the adapter does nothing and the claim is empty
    unload(model)
    assert differences(model, name) == bare


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_of_it_says_the_same(name, tmp_path):
    model = load_adapter(base_of(name), FIXTURES / "peft" / name)
    save_adapter(model, tmp_path / "again", layout="peft")
    assert max(differences(load_adapter(base_of(name), tmp_path / "again"), name)) < 1e-5


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_what_we_write(name, tmp_path):
    """Both folders are computed by PEFT in float64, so that all of the difference is in the files.

    In float32 PEFT's own rounding is as large as the bound: its logits of these fixtures are up to 1.3e-5 from those
    that it computes in float64.
    """
    pytest.importorskip("torch", reason="needs the `parity` extra")
    peft = pytest.importorskip("peft", reason="needs the `parity` extra")
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))
    from adapter_cases import logits_of
    from make_peft_fixtures import base_model

    model = load_adapter(base_of(name), FIXTURES / "peft" / name)
    save_adapter(model, tmp_path / "ours", layout="peft")
    expected = mx.load(str(FIXTURES / "peft" / name / "expected.safetensors"))
    inputs = {key: np.array(array) for key, array in expected.items() if key != "logits"}

    def answers_of(folder):
        base = base_model(config_of(name)["base_model_name_or_path"])
        return logits_of(peft.PeftModel.from_pretrained(base, folder).double().eval(), inputs)

    try:
        ours = answers_of(tmp_path / "ours")
    except ValueError as error:
        if "does not support past key values" not in str(error):
            raise
        pytest.skip("the transformers installed gives encoders no prefix")
    theirs = answers_of(FIXTURES / "peft" / name)
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(theirs - np.array(expected["logits"])).max() < 5e-5
