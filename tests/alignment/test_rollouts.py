"""Rollouts: what is kept of answers stands at their tokens, and a restored source goes on with the same batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
from alignment_runs import prompts, settings_for, write

from mlxlm.alignment import prepare
from mlxlm.alignment.reference import log_probabilities
from mlxlm.data import Example


@pytest.fixture
def source(tiny_directory, tmp_path):
    """A function: method -> its source of rollouts, fresh."""

    def made(method, **changes):
        data = write(tmp_path / "data", train=prompts(4), valid=prompts(2, 1))
        settings = settings_for(method, tiny_directory, data, tmp_path / "out", **changes)
        return prepare(settings, say=lambda text: None).source

    return made


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_numbers_stand_at_the_tokens_of_the_answers(source, method):
    rollouts = source(method, kl_target=1.0)
    batch = rollouts.next()
    chosen = [rollouts.rollouts[i] for i in rollouts._order[0]]
    asked = [list(rollouts.prompts[one.prompt].tokens) for one in chosen]
    examples = [
        Example([*prompt, *one.tokens], [False] * len(prompt) + [True] * len(one.tokens))
        for prompt, one in zip(asked, chosen, strict=True)
    ]
    wanted = log_probabilities(rollouts.model, examples, 2)
    np.testing.assert_allclose(batch["old"].sum(1), wanted, rtol=1e-4)
    assert not batch["old"][~batch["mask"]].any()
    for row, (prompt, one) in enumerate(zip(asked, chosen, strict=True)):
        places = np.flatnonzero(batch["mask"][row])
        assert batch["targets"][row, places].tolist() == one.tokens
        assert places[0] == len(prompt) - 1
        np.testing.assert_allclose(batch["advantages"][row, places], one.advantages, rtol=1e-6)
    if method == "grpo":
        groups = np.array([one.advantages[0] for one in rollouts.rollouts]).reshape(-1, 3)
        np.testing.assert_allclose(groups.sum(1), 0, atol=1e-6)
        np.testing.assert_allclose(batch["reference"].sum(1), wanted, rtol=1e-4)
    else:
        assert {"old_values", "returns"} <= batch.keys()
    assert rollouts.metrics()["kl"] == pytest.approx(0, abs=1e-4)


def test_a_restored_source_gives_the_same_batches(source):
    first = source("grpo", passes=2)
    first.next()
    state = json.loads(json.dumps(first.state()))
    rest = [first.next() for _ in range(5)]
    again = source("grpo", passes=2)
    again.restore(state)
    for one, two in zip(rest, (again.next() for _ in range(5)), strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_prompts_whose_answers_are_worth_the_same_are_replaced(source):
    rollouts = source("dapo", dynamic_sampling=2, overlong="keep")
    calls = []
    rollouts.reward = lambda answered: calls.append(len(answered)) or [1.0] * len(answered)
    rollouts.next()
    assert calls == [6, 6, 6]  # two prompts of three answers, and two more rounds in which nothing is better
    assert len(rollouts.rollouts) == 6
    assert all(gain == 0 for one in rollouts.rollouts for gain in one.advantages)


def test_answers_without_an_end_are_left_out_where_that_is_wanted(source):
    rollouts = source("dapo", max_tokens=1, dynamic_sampling=0)
    batch = rollouts.next()
    finished = np.array([rollouts.rollouts[i].finished for i in rollouts._order[0]])
    assert (batch["mask"].any(1) == finished).all()
