"""Memory of a rank, as MLX counts it in real processes: it falls with their number where they share."""

from __future__ import annotations

import jobs
import pytest

CASES = jobs.TWO["memory"][2]


def test_each_of_two_ranks_holds_half_of_what_they_share(two_ranks):
    for got in two_ranks["memory"]:
        whole, shared = (
            {name: int(got[f"{case}/{name}"]) for name in ("weights", "rest", "peak")}
            for case in ("dp=2 0", "dp=2 3")
        )  # fmt: skip
        assert shared["rest"] == pytest.approx(whole["rest"] / 2, rel=0.02)
        assert shared["weights"] == pytest.approx(whole["weights"] / 2, rel=0.02)
        assert shared["peak"] < 0.75 * whole["peak"]
        assert got["tp=2 0/weights"] == pytest.approx(whole["weights"] / 2, rel=0.02)
        assert got["tp=2 0/rest"] == pytest.approx(whole["rest"] / 2, rel=0.02)
        assert got["dp=2 1/rest"] == pytest.approx(whole["rest"] / 2, rel=0.02)


@pytest.mark.slow
def test_each_of_four_ranks_holds_a_quarter(slow_ranks):
    (alone,) = slow_ranks(1)["memory"]
    for got in slow_ranks(4)["memory"]:
        for case in jobs.MEASURED_FOUR:
            assert got[f"{case}/rest"] == pytest.approx(alone["dp=1 0/rest"] / 4, rel=0.1)
            assert got[f"{case}/peak"] < 0.5 * alone["dp=1 0/peak"]


def test_a_run_that_does_not_fit_one_rank_is_refused_everywhere(two_ranks):
    one, other = (got["said"].tolist() for got in two_ranks["refused"])
    assert one == other
    assert "in rank 1, but" in one[0]
    assert "--zero 1 would fit" in one[0]
    assert "use more processes along tp or pp" in one[1]
    assert all(got["fits"] for got in two_ranks["refused"])
