"""Two processes that share a run make of it what one does, by every way of learning."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from alignment_runs import rows_for, texts, write
from sharing_cases import CASES, aligned

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
from processes import run_ranks


@pytest.fixture
def data(tmp_path):
    """A folder with the rows of every method, and texts."""
    for method in CASES:
        write(tmp_path / "data" / method, train=rows_for(method, 5), valid=rows_for(method, 3, 1))
    write(tmp_path / "texts", train=[{"text": text} for text in texts(5)])
    return tmp_path / "data"


@pytest.mark.parametrize(
    "methods",
    [("dpo", "grpo"), pytest.param(("reward", "kto", "dr-grpo", "ppo"), marks=pytest.mark.slow)],
    ids=lambda methods: "-".join(methods),
)
def test_two_processes_make_of_a_run_what_one_does(tiny_directory, data, tmp_path, methods):
    """GRPO is stopped after two steps besides, and resumed, in the middle of an iteration."""
    ranks = run_ranks(2, "tests.alignment.sharing_cases", "shared", tiny_directory, data, *methods, limit=120)
    for method in methods:
        outcome, tensors = aligned(method, tiny_directory, data, tmp_path / method)
        for rank in ranks:
            for name, array in tensors.items():
                np.testing.assert_allclose(rank[f"{method}/{name}"], np.array(array), atol=1e-5, err_msg=name)
            for name, value in outcome.after.items():
                np.testing.assert_allclose(rank[f"{method}/after {name}"], value, atol=1e-4, err_msg=f"{method} {name}")
        assert outcome.before != outcome.after
    for name, array in ranks[0].items():
        assert np.array_equal(array, ranks[1][name]), name
