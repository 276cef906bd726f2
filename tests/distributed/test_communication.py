"""Communication among real processes: every operation in every grouping, gradients through it, and ranks that fail."""

from __future__ import annotations

import itertools
import tempfile
import time

import numpy as np
import pytest
from communication_cases import data
from processes import finish, run_ranks, start_ranks

import mlxlm  # noqa: F401  before mlx.core


def test_every_operation_among_all(two_ranks):
    check(two_ranks["collectives"], ["all"])


def test_every_operation_among_some():
    check(run_ranks(4, "communication_cases", "collectives", "pairs", "crossed"), ["pairs", "crossed"])


def check(results, groupings):
    for rank, grouping in itertools.product(range(len(results)), groupings):
        found = results[rank].items()
        got = {name.partition("/")[2]: array for name, array in found if name.startswith(grouping)}
        ranks = [int(one) for one in got["ranks"]]
        index, parts = ranks.index(rank), [np.array(data(one, (4, 6))) for one in ranks]
        total, size = sum(parts), len(ranks)
        np.testing.assert_array_equal(got["sum"], total)
        np.testing.assert_array_equal(got["large"], sum(np.array(data(one, (5000,))) for one in ranks))
        np.testing.assert_array_equal(got["half"], sum(np.array(data(one, (5,))) for one in ranks))
        np.testing.assert_array_equal(got["integers"], sum(np.array(data(one, (3,))) for one in ranks))
        np.testing.assert_array_equal(got["mean"], total / size)
        np.testing.assert_array_equal(got["stack"], np.stack(parts))
        np.testing.assert_array_equal(got["gather"], np.concatenate(parts, axis=1))
        rows = 4 // size
        np.testing.assert_array_equal(got["scatter"], total[index * rows : (index + 1) * rows])
        np.testing.assert_array_equal(got["broadcast"], parts[1])
        np.testing.assert_array_equal(got["rotated"], parts[index - 1])
        assert got["big"] == ranks[1 - index]


def test_gradients_through_shared_work(two_ranks):
    results = two_ranks["gradients"]
    x, weight = np.array(data(10, (3, 8))), np.array(data(11, (8, 8)))
    y = x @ weight
    of_own = sum(2 * (z := np.array(data(20 + rank, (3, 8)))).T @ (z @ weight) for rank in range(2))
    for rank, got in enumerate(results):
        rows = slice(4 * rank, 4 * rank + 4)
        assert got["loss"] == (y**2).sum()
        np.testing.assert_array_equal(got["dx"], 2 * y @ weight.T)
        np.testing.assert_array_equal(got["dweight"], (2 * x.T @ y)[rows])
        np.testing.assert_array_equal(got["dpart"], (2 * x.T @ y)[:, rows])
        np.testing.assert_array_equal(got["dsharded"], of_own[rows])


def fail(function, *arguments, timeout=2.0):
    """Statuses, errors and seconds of two ranks of which one fails."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(2, "communication_cases", function, *arguments, folder=folder, timeout=timeout)
        started = time.monotonic()
        statuses, errors = finish(processes, 30)
        return statuses, errors, time.monotonic() - started


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("exit", "rank 1 is gone"),
        ("hang", "did not come to it"),
        pytest.param("raise", "a mistake of rank 1", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_ends_the_run_everywhere_and_is_named(how, named):
    statuses, errors, seconds = fail("dies", how)
    assert statuses[0] == 75
    assert statuses[1] != 0
    assert named in "".join(errors)
    assert "gradients" in errors[0] or how == "raise"
    assert seconds < 15


@pytest.mark.parametrize(
    ("who", "where"),
    [(0, "alone"), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, "alone"), (1, "sum")))],
)
def test_survivors_of_a_rank_that_dies_where_nothing_limits_the_wait_say_one_line(who, where):
    statuses, errors, seconds = fail("dies_first", who, where)
    assert statuses[who] == 9
    assert statuses[1 - who] == 75
    (line,) = (line for line in errors[1 - who].splitlines() if not line.startswith("[ring]"))  # MLX's own
    assert line.startswith(f"error: rank {1 - who} ")
    assert f"{'sum' if who else 'the first rank'}" in line
    assert f"rank {who} is gone: its process ended" in line
    assert seconds < 15


def test_ranks_that_disagree_are_told_apart():
    statuses, errors, _ = fail("different_texts")
    assert statuses == [75, 75]
    assert "disagree about the settings: rank 1 of 2" in errors[0]
    statuses, errors, _ = fail("different_operations")
    assert statuses[0]
    assert statuses[1]
    assert "expected 'a sum' number 1 (float32 (2,)), got 'a sum' number 1 (float32 (3,))" in "".join(errors)
