"""Specs print, compare, hash, and go to JSON and back; mistakes in them are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxlm.errors import ConfigError
from mlxlm.layers import AlibiSpec, AttentionSpec, LayerNormSpec, RMSNormSpec, RotarySpec, Spec, YarnScalingSpec
from mlxlm.models import family_of

FIXTURES = sorted((Path(__file__).parent.parent / "fixtures" / "models").glob("*/config.json"))
ROTARY = RotarySpec(dim=8, scaling=YarnScalingSpec(factor=4.0, original_length=64))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.parent.name)
def test_every_familys_configuration_goes_through_json(path):
    values = json.loads(path.read_text())
    config = family_of(values).read_config(values)
    text = json.dumps(config.to_json())
    again = Spec.from_json(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)


def test_defaults_are_left_out():
    assert RMSNormSpec(dim=8).to_json() == {"kind": "RMSNorm", "dim": 8}
    assert RMSNormSpec(dim=8, offset=1.0).to_json() == {"kind": "RMSNorm", "dim": 8, "offset": 1.0}


def test_choices_nest():
    spec = AttentionSpec(
        dim=8, num_heads=2, num_kv_heads=1, head_dim=4, causal=True, positions=ROTARY, key_norm=LayerNormSpec(dim=4)
    )
    assert Spec.from_json(spec.to_json()) == spec
    assert spec != Spec.from_json({**spec.to_json(), "positions": AlibiSpec(num_heads=2).to_json()})


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"kind": "RMSNrm", "dim": 8}, "unknown kind of spec 'RMSNrm'; did you mean 'RMSNorm'"),
        ({"kind": "RMSNorm", "dim": 8, "epsilon": 1}, "RMSNorm has no field 'epsilon'"),
        ({"kind": "RMSNorm"}, "RMSNorm lacks dim"),
        ({"dim": 8}, "a spec is a JSON object with a 'kind'"),
        ([1], "a spec is a JSON object with a 'kind'"),
    ],
    ids=["kind", "field", "missing", "no-kind", "list"],
)
def test_mistakes_are_named(plain, message):
    with pytest.raises(ConfigError) as error:
        Spec.from_json(plain)
    assert message in str(error.value)


def test_a_spec_can_not_be_changed():
    with pytest.raises(AttributeError):
        ROTARY.dim = 4


def test_two_specs_of_one_kind_are_refused():
    with pytest.raises(TypeError, match="two specs of kind 'Rotary'"):
        type("RotarySpec", (Spec,), {})
