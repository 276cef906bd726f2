"""`mlxlm serve` before it serves."""

from __future__ import annotations

from mlxlm.cli.serve import served_name


def test_a_model_is_called_by_the_last_part_of_its_path_or_hub_id(tmp_path, monkeypatch):
    (tmp_path / "some-model").mkdir()
    monkeypatch.chdir(tmp_path / "some-model")
    assert served_name("HuggingFaceTB/SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"
    assert served_name(str(tmp_path / "some-model")) == "some-model"
    assert served_name(".") == "some-model"
