"""Ten AdamW steps under every mesh against one process: losses and final weights, and what each rank holds."""

from __future__ import annotations

import jobs
import numpy as np
import pytest
from training_cases import Batches
from training_runs import tiny_model

from mlxlm.data import RowShare


def check(results, case):
    for got in results:
        assert got[f"{case}/moved"] > 0.01
        assert got[f"{case}/losses"] < 1e-5
        assert got[f"{case}/weights"] < 1e-5
    assert len({float(got[f"{case}/evaluated"]) for got in results}) == 1


@pytest.fixture
def two(two_ranks):
    return two_ranks["trained"]


@pytest.mark.parametrize("case", jobs.TRAINED)
def test_two_ranks_train_as_one_process_does(two, case):
    check(two, case)


def check_shards(results, name, stages):
    """Each of two ranks keeps half of the trained weights and of the optimizer's state."""
    for got in results:
        for stage in stages:
            case = f"{name} dp=2 {stage}"
            assert got[f"{case}/count"] == pytest.approx(got[f"{case}/whole"] / 2, rel=0.01)
            assert got[f"{case}/state"] == pytest.approx(got[f"{case}/whole"], rel=0.01)  # two moments
            if stage == 3:
                assert got[f"{case}/model"] == pytest.approx(got[f"{case}/whole"] / 2, rel=0.01)


def test_shards_take_their_part_of_weights_and_optimizer_state(two):
    check_shards(two, "llama", [3])
    check_shards(two, "t5", [2])
    for got in two:
        assert got["llama dp=2 0/model"] == got["llama dp=2 0/count"] == got["llama dp=2 0/whole"]
        assert got["llama tp=2 0/count"] < 0.52 * got["llama tp=2 0/whole"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 8])
def test_other_meshes_train_as_one_process_does(slow_ranks, count):
    results = slow_ranks(count)["trained"]
    for case in jobs.SLOW[count]["trained"][2]:
        check(results, case)
    if count == 2:
        check_shards(results, "bert", [1, 2, 3])
        check_shards(results, "llama", [1, 2])


def test_the_rows_of_all_ranks_are_those_of_the_source():
    model = tiny_model()
    whole, shares = Batches(model, rows=5), [RowShare(Batches(model, rows=5), index, 3) for index in range(3)]
    for _ in range(3):
        batch, parts = whole.next(), [share.next() for share in shares]
        for name, array in batch.items():
            for row in range(5):
                np.testing.assert_array_equal(parts[row % 3][name][row // 3], array[row])
    assert shares[0].state() == whole.state()
    lonely = RowShare(Batches(model, rows=1), 2, 3).next()
    assert (lonely["targets"] == -100).all()
