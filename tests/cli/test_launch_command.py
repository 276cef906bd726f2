"""`mlxlm launch`: what follows the verb is the verb's, with or without a -- before it."""

from __future__ import annotations

import sys

import pytest

from mlxlm.distributed import launching

VERB = ["pretrain", "--config", "recipe.yaml", "--mesh", "dp=2", "-n", "7"]


@pytest.mark.parametrize("between", [[], ["--"]], ids=["plain", "dashes"])
def test_the_flags_of_the_verb_are_handed_on(mlxlm_command, monkeypatch, between):
    ran = []
    monkeypatch.setattr(launching, "launch", lambda words, count, **options: ran.append((words, count)) or 0)
    status, _, err = mlxlm_command("launch", "-n", 2, *between, *VERB)
    assert (status, ran) == (0, [([sys.executable, "-m", "mlxlm", *VERB], 2)]), err


def test_the_number_of_processes_stands_before_the_verb(mlxlm_command):
    status, _, err = mlxlm_command("launch", "finetune", "-n", 2)
    assert (status, "before the verb, as launch -n 2 finetune" in err) == (2, True), err
