"""Fine-tuning under every mesh: adapters, measures and answers are those of one process."""

from __future__ import annotations

import jobs
import pytest


def check(got, case):
    assert got[f"{case}/names"]
    assert got[f"{case}/weights"] < 1e-5
    assert got[f"{case}/measures"] < 1e-5
    assert got[f"{case}/answers"]
    assert got[f"{case}/moved"] > 1e-6


@pytest.mark.parametrize("case", jobs.TUNED)
def test_two_ranks_learn_what_one_process_does(two_ranks, case):
    check(two_ranks["tuned"][0], case)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_other_methods_and_meshes_learn_what_one_process_does(slow_ranks, count):
    got = slow_ranks(count)["tuned"][0]
    for case in jobs.SLOW[count]["tuned"][2]:
        check(got, case)
