"""`mlxlm families` lists what there is, and claims no more than the fixtures show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxlm.errors import UnsupportedModelError
from mlxlm.models import families, family, model_types

FIXTURES = Path(__file__).parent.parent / "fixtures" / "models"
TESTED = {json.loads(path.read_text())["model_type"] for path in FIXTURES.glob("*/config.json")}


def test_every_family_is_listed_with_its_reference(mlxlm_command):
    status, out, _ = mlxlm_command("families")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].split() == ["family", "model_type", "GGUF", "reference"]
    for one, line in zip(families(), lines[1:], strict=False):
        assert line.startswith(one.name)
        assert line.endswith(one.reference)
        assert all(name in line for name in one.model_types)


@pytest.mark.parametrize("one", families(), ids=lambda one: one.name)
def test_what_is_said_to_equal_transformers_has_a_fixture(one):
    assert one.reference != "transformers" or set(one.model_types) <= TESTED


def test_every_model_type_belongs_to_a_listed_family():
    assert {family(name).name for name in model_types()} == {one.name for one in families()}


def test_an_unsupported_model_type_gets_the_nearest_ones():
    with pytest.raises(UnsupportedModelError, match=r"'robert'.*did you mean 'roberta' or 'bert'"):
        family("robert")
