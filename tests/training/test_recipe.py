"""Recipes: what is refused, and how overrides and defaults come together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mlxlm.errors import ConfigError, UsageError
from mlxlm.objectives.spans import raw_length
from mlxlm.training import recipe
from mlxlm.training.plan import MemoryPlanError
from mlxlm.training.yaml_files import parse_override

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("pretrain_*/recipe.yaml"))


def values(**changes):
    """A small recipe that is in order, with values set by dotted names (__ for a dot)."""
    base = {
        "model": {
            "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
        },
        "tokenizer": "nowhere", "output": "run", "objective": {"name": "causal"},
        "data": {"train": "texts", "max_length": 16, "batch_size": 4}, "training": {"steps": 10},
    }  # fmt: skip
    return recipe.override(base, [(name.replace("__", "."), value) for name, value in changes.items()])


def test_defaults_are_filled_in_and_survive_a_round_trip(tmp_path):
    checked = recipe.check(values(output=str(tmp_path)))
    assert checked.values["data"]["train"] == ["texts"]
    assert checked.values["training"]["learning_rate"] == checked.settings.learning_rate == 1e-4
    checked.save()
    assert recipe.check(recipe.read(tmp_path / "recipe.yaml")) == checked


def test_all_unknown_keys_are_named_at_once_with_the_nearest():
    given = values(
        modle=1, data__batchsize=2, objective__document_maks=True, training__learning_rat=1, model__hiden_size=3
    )
    with pytest.raises(ConfigError) as error:
        recipe.check(given)
    for wrong, right in (
        ("modle", "model"), ("data.batchsize", "batch_size"), ("objective.document_maks", "document_mask"),
        ("training.learning_rat", "learning_rate"),
    ):  # fmt: skip
        assert re.search(rf"unknown key '{re.escape(wrong)}'; did you mean [^;]*'{right}'", str(error.value))
    assert "hiden_size" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tokenizer": None}, "tokenizer is missing"),
        ({"data": [1]}, "data is \\[1\\]; expected a mapping"),
        ({"data__batch_size": 0}, "data.batch_size is 0; expected a whole number"),
        ({"data__batch_size": True}, "data.batch_size is True"),
        ({"data__valid_fraction": 1.0}, "data.valid_fraction is 1.0"),
        ({"data__valid": "a", "data__valid_fraction": 0.1}, "both valid and valid_fraction"),
        ({"data__train": []}, "data.train is missing"),
        ({"data__train": [{"locatoin": "a"}]}, "did you mean 'location'"),
        ({"objective__name": "casual"}, "did you mean 'causal'"),
        ({"objective__pad_id": 3}, "unknown key 'objective.pad_id'"),
        ({"training__learning_rate": "fast"}, "training.learning_rate is 'fast'; expected float"),
        ({"training__learning_rate": -1}, "learning_rate is -1"),
        ({"training__steps": 1.5}, "training.steps is 1.5"),
        ({"training__optimizer": "adamv"}, "did you mean 'adamw'"),
        ({"model__model_type": "lama"}, "did you mean 'llama'"),
        ({"model": "no/such/config.json"}, "no such file"),
        ({"memory": "aut"}, "did you mean 'auto'"),
        ({"loss_chunk": 0}, "loss_chunk is 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        recipe.check(values(**changes))


def test_numbers_with_an_exponent_are_numbers_and_keys_stand_once(tmp_path):
    assert parse_override("training.learning_rate=1e-3") == ("training.learning_rate", 1e-3)
    assert parse_override("training.betas=[0.9, 95e-2]") == ("training.betas", [0.9, 0.95])
    (tmp_path / "a.yaml").write_text("model: 1\nmodel: 2\n")
    with pytest.raises(ConfigError, match="there twice"):
        recipe.read(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="is a mapping"):
        recipe.read(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not YAML"):
        recipe.read(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        recipe.read(tmp_path / "none.yaml")


def test_overrides_leave_the_given_values_alone():
    before = values()
    after = recipe.override(before, [("training.steps", 3), ("data.cache", "there")])
    assert (before["training"]["steps"], after["training"]["steps"], after["data"]["cache"]) == (10, 3, "there")
    with pytest.raises(UsageError, match="no parts to set"):
        recipe.override(before, [("output.folder", 3)])
    with pytest.raises(UsageError, match="NAME=VALUE"):
        parse_override("training.steps")


def test_memory_is_checked_fitted_or_left_alone():
    big = {"data__batch_size": 64, "model__max_position_embeddings": 256, "data__max_length": 256}
    whole = recipe.plans.predict(recipe.check(values(**big)).config, recipe.check(values(**big)).plan_settings()).peak
    with pytest.raises(MemoryPlanError, match="--batch-size"):
        recipe.check(values(**big)).fitted(whole // 2)
    fitted = recipe.check(values(**big, memory="auto")).fitted(whole // 2)
    assert fitted.values["data"]["batch_size"] * fitted.settings.accumulation == 64
    assert recipe.plans.predict(fitted.config, fitted.plan_settings()).peak <= whole // 2
    off = recipe.check(values(**big, memory=False))
    assert off.fitted(1) is off
    assert yaml.safe_load(yaml.safe_dump(off.values))["memory"] == "off"


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"name": "causal"}, (None, 1.0)),
        ({"name": "span-corruption"}, (29, 1.0)),  # 141 raw tokens make 128 and 29
        ({"name": "span-corruption", "density": 0.5}, (raw_length(128, 0.5, 3.0)[1], 1.0)),
        ({"name": "masked"}, (None, 0.15 + 1 / 16)),
        ({"name": "masked", "rate": 0.5}, (None, 1.0)),
    ],
    ids=str,
)
def test_the_plan_knows_how_many_targets_an_objective_gives(objective, expected):
    made = recipe.check(values(objective=objective, data__max_length=128)).plan_settings()
    assert (made.target_length, made.targets) == expected


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_examples_are_in_order(path):
    checked = recipe.check(recipe.read(path))
    assert checked.config.max_length is None or checked.config.max_length >= checked.values["data"]["max_length"]


def test_there_is_an_example_of_each_kind():
    assert {recipe.read(path)["objective"]["name"] for path in EXAMPLES} == {
        "causal", "masked", "span-corruption", "blank-infilling",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "frugal"),
    [({}, False), ({"training__recompute_layers": -1}, True), ({"memory": "auto"}, True), ({"memory": False}, False)],
)
def test_a_frugal_run_asks_for_small_command_graphs(changes, frugal, monkeypatch):
    asked = []
    monkeypatch.setattr(recipe.runtime, "small_command_graphs", lambda: asked.append(True))
    recipe.check(values(**changes)).fitted()
    assert bool(asked) == frugal
