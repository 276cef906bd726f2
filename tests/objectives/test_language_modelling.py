"""Causal and prefix language modelling: what is predicted from what."""

from __future__ import annotations

import numpy as np
import pytest

from mlxlm.data.batch import IGNORE
from mlxlm.errors import UsageError
from mlxlm.objectives import CausalLM, PrefixLM
from mlxlm.objectives.rows import padded_length

A, B = np.arange(10, 15), np.arange(20, 23)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_each_token_predicts_the_next_of_its_document(rng):
    batch = CausalLM().batch([[A, B]], rng, 7)
    assert batch["tokens"].tolist() == [[10, 11, 12, 13, 14, 20, 21]]
    assert batch["targets"].tolist() == [[11, 12, 13, 14, IGNORE, 21, 22]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 1, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]


def test_short_rows_are_padded_and_padding_predicts_nothing(rng):
    batch = CausalLM(pad_id=9).batch([[A, B], [B]], rng, 7)
    assert batch["tokens"].tolist()[1] == [20, 21, 9, 9, 9, 9, 9]
    assert batch["targets"].tolist()[1] == [21, 22] + [IGNORE] * 5
    assert batch["segments"].tolist()[1] == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("objective", [CausalLM(), PrefixLM()], ids=["causal", "prefix"])
def test_tiny_texts(objective, size, rng):
    batch = objective.batch([[A[:size]]], rng, 8)
    counted = batch["targets"] != IGNORE
    assert counted.sum() == (size - 1 if isinstance(objective, CausalLM) else counted.sum())
    assert counted.any() == (size > 1)
    if "prefix_lengths" in batch:
        assert batch["prefix_lengths"][0] >= 1


def test_a_row_that_is_too_long_is_refused(rng):
    with pytest.raises(UsageError, match="9 tokens"):
        CausalLM().batch([[np.arange(9)]], rng, 7)


def test_without_a_document_mask_nothing_separates_documents(rng):
    assert set(CausalLM(document_mask=False).batch([[A, B]], rng, 7)) == {"tokens", "targets"}


def test_a_prefix_predicts_only_what_follows_it(rng):
    text, seen = np.arange(5, 26), set()
    for _ in range(300):
        batch = PrefixLM().batch([[text]], rng, 20)
        prefix = int(batch["prefix_lengths"][0])
        seen.add(prefix)
        assert batch["tokens"].tolist() == [text[:-1].tolist()]
        assert batch["targets"].tolist() == [[IGNORE] * (prefix - 1) + text[prefix:].tolist()]
    assert seen == set(range(1, 21))


def test_bounds_of_the_prefix(rng):
    objective = PrefixLM(min_prefix=0.25, max_prefix=0.5)
    seen = {int(objective.batch([[np.arange(100)]], rng, 99)["prefix_lengths"][0]) for _ in range(500)}
    assert (min(seen), max(seen)) == (25, 50)
    with pytest.raises(UsageError, match="min <= max"):
        PrefixLM(min_prefix=0.6, max_prefix=0.5)


def test_few_lengths_occur():
    assert [padded_length(n, 4096) for n in (1, 64, 65, 512, 513, 1025, 2049)] == [64, 64, 128, 512, 640, 1280, 2560]
    assert padded_length(100, 100) == 100
    assert len({padded_length(n, 4096) for n in range(1, 4097)}) <= 24
