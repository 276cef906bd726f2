"""Pipelines: balanced stages, schedules, and generation through stages and shared matrices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_models import small_model

from mlxlm.distributed import join
from mlxlm.distributed.pipeline import order
from mlxlm.distributed.stages import StagePlan, balanced, layer_costs
from mlxlm.errors import UsageError


@pytest.mark.parametrize("costs", [[1, 1, 1, 1], [9, 1, 1, 1, 1], [3, 1, 4, 1, 5, 9, 2, 6], [5]])
def test_no_other_cut_has_a_smaller_largest_stage(costs):
    for stages in range(1, len(costs) + 1):
        bounds = balanced(costs, stages)
        assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]
        assert (bounds[0][0], bounds[-1][1], len(bounds)) == (0, len(costs), stages)
        largest = max(sum(costs[start:stop]) for start, stop in bounds)
        for cuts in itertools.combinations(range(1, len(costs)), stages - 1):
            edges = [0, *cuts, len(costs)]
            assert largest <= max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))


def test_embeddings_and_head_count_among_the_costs():
    for name in ("llama", "llama-tied"):
        model = small_model(name)
        first, last = layer_costs(model.config)
        layer = sum(array.size for _, array in tree_flatten(model.decoder.layers[0].parameters()))
        table = model.config.embeddings.vocab_size * model.config.dim
        assert (first, last) == (layer + table, layer + table + model.config.dim)  # the final norm


@pytest.mark.parametrize(("schedule", "kept"), [("gpipe", [6, 6, 6]), ("1f1b", [3, 2, 1])])
def test_a_schedule_does_everything_once_and_keeps_no_more_than_it_must(schedule, kept):
    for stage in range(3):
        done = list(order(schedule, 3, stage, 6))
        assert sorted(done) == sorted((what, batch) for what in ("forward", "backward") for batch in range(6))
        alive, most = set(), 0
        for what, batch in done:
            if what == "forward":
                alive.add(batch)
            else:
                alive.remove(batch)  # never before its forward pass
            most = max(most, len(alive))
        assert most == kept[stage]
    assert list(order("1f1b", 4, 0, 1)) == [("forward", 0), ("backward", 0)]
    with pytest.raises(UsageError, match="1f1b"):
        list(order("1fb1", 2, 0, 1))


def test_shared_parameters_have_several_holders():
    plan = StagePlan.of(small_model("t5").config, 4)
    assert plan.holders("embeddings.token.weight")[0] == 0
    assert plan.holders("embeddings.token.weight")[-1] == 3
    assert len(plan.holders("encoder.positions.weight")) >= 1
    assert plan.holders("decoder.norm.weight") == (3,)
    with pytest.raises(UsageError, match="pp=9: the model has 5 layers; pp=5 would do"):
        StagePlan.of(small_model("t5").config, 9)


def check(results, names):
    for got in results:
        for name in names:
            np.testing.assert_array_equal(got[f"{name}/shared-tokens"], got[f"{name}/tokens"])


def test_generation_through_two_stages_gives_the_same_tokens(two_ranks):
    check(two_ranks["stages"], ["llama", "gpt2", "t5"])


@pytest.mark.slow
def test_generation_through_stages_of_shared_matrices_gives_the_same_tokens(slow_ranks):
    check(slow_ranks(4)["stages"], ["llama", "t5"])


def test_a_schedule_is_one_of_stages_that_there_are():
    for schedule, words in (("1f2b", "did you mean '1f1b'"), ("gpipe", "give --mesh pp=2")):
        with pytest.raises(UsageError, match=words), join(None, schedule=schedule):
            pass
