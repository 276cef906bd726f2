"""Fine-tuning and alignment that are to take little memory tell MLX before a model is read."""

from __future__ import annotations

import pytest

from mlxlm import runtime
from mlxlm.alignment import AlignSettings, align
from mlxlm.errors import MlxlmError
from mlxlm.training.finetune import FinetuneSettings, finetune


class Asked(Exception):
    """The question came."""


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    def ask():
        raise Asked

    monkeypatch.setattr(runtime, "small_command_graphs", ask)


FRUGAL = [{"grad_checkpoint": True}, {"recompute_layers": 2}, {"memory": "auto"}, {"memory": "low"}]


@pytest.mark.parametrize("changes", FRUGAL, ids=str)
def test_a_frugal_run_asks_for_small_command_graphs(changes, tmp_path):
    values = {"model": str(tmp_path), "data": str(tmp_path / "none"), "adapter_path": str(tmp_path / "out"), **changes}
    with pytest.raises(Asked):
        finetune(FinetuneSettings.from_json(values))
    with pytest.raises(Asked):
        align(AlignSettings.from_json({**values, "method": "dpo"}))


def test_an_ordinary_one_does_not(tmp_path):
    values = {"model": str(tmp_path), "data": str(tmp_path / "none"), "adapter_path": str(tmp_path / "out")}
    with pytest.raises(MlxlmError):
        finetune(FinetuneSettings.from_json(values))
    with pytest.raises(MlxlmError):
        align(AlignSettings.from_json({**values, "method": "dpo"}))
