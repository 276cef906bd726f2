"""Ring attention: outputs and gradients are those of whole rows, and memory falls with the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from ring_cases import masks
from training_cases import Batches
from training_runs import tiny_model

from mlxlm.data import ColumnShare
from mlxlm.errors import UsageError


def check(results):
    for got in results:
        for name in masks(30):
            assert got[f"{name}/output"] < 2e-6
            assert got[f"{name}/gradients"] < 1e-5


def test_parts_of_rows_attend_to_whole_rows_exactly(two_ranks):
    check(two_ranks["ring"])


@pytest.mark.slow
def test_three_parts_do_too(slow_ranks):
    check(slow_ranks(3)["ring"])


@pytest.mark.slow
def test_the_peak_of_a_rank_falls_with_their_number(slow_ranks):
    peaks = [max(int(got["peak"]) for got in slow_ranks(count)["peak"]) for count in (1, 2, 4)]
    assert peaks[1] < 0.7 * peaks[0]
    assert peaks[2] < 0.7 * peaks[1]


def test_the_columns_of_all_ranks_are_those_of_the_source():
    model = tiny_model()
    batch = Batches(model, length=11).next()
    parts = [ColumnShare(Batches(model, length=11), index, 3).next() for index in range(3)]
    assert {part["tokens"].shape for part in parts} == {(4, 4)}
    for name, filler in (("tokens", 0), ("targets", -100)):
        joined = np.concatenate([part[name] for part in parts], axis=1)
        np.testing.assert_array_equal(joined[:, :11], batch[name])
        assert (joined[:, 11:] == filler).all()
    np.testing.assert_array_equal(parts[2]["key_lengths"], batch["key_lengths"])


def test_labels_of_whole_rows_are_refused():
    class Labelled(Batches):
        def next(self):
            return {**super().next(), "labels": np.zeros(4, dtype=np.int32)}

    with pytest.raises(UsageError, match="labels are about whole rows"):
        ColumnShare(Labelled(tiny_model()), 0, 2).next()
