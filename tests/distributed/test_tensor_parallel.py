"""Tensor parallelism: losses, gradients, logits and generated tokens are those of one process, for every mechanism."""

from __future__ import annotations

import jobs
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_models import small_model

from mlxlm.distributed.tensor_parallel import share_tensors
from mlxlm.distributed.tensor_plan import TensorPlan
from mlxlm.errors import UsageError
from mlxlm.peft import Ia3, PrefixTuning, apply

MODELS = tuple(jobs.SHARED)


class Two:
    """A communicator of the first of two ranks that say nothing."""

    size, index = 2, 0


@pytest.fixture
def two(two_ranks):
    return two_ranks["shared"]


def check(results, name):
    for got in results:
        assert got[f"{name}/loss"] < 1e-6
        assert got[f"{name}/gradients"] < 1e-5
        assert got[f"{name}/logits"] < 1e-5
        assert got[f"{name}/names"]
        if f"{name}/tokens" in got:
            np.testing.assert_array_equal(got[f"{name}/shared-tokens"], got[f"{name}/tokens"])


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_that_share_a_model_compute_what_one_does(two, name):
    check(two, name)


def test_each_rank_holds_its_share_of_the_weights(two):
    assert [round(float(got["llama/held"]), 2) for got in two] == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.slow
def test_four_ranks_copy_key_value_heads_where_there_are_fewer(slow_ranks):
    results = slow_ranks(4)["shared"]
    for name in ("llama", "t5", "falcon"):
        check(results, name)


def test_every_parameter_is_covered_once_by_the_ranks():
    from mlx.utils import tree_flatten

    for name in MODELS[:-1]:
        model = small_model(name)
        for key, array in tree_flatten(model.parameters()):
            pieces = {TensorPlan(model.config, 2, index).piece(key, array.shape) for index in range(2)}
            assert sum(piece.count for piece in pieces) in (array.size, *([] if len(pieces) == 2 else [array.size]))


def test_adapters_without_a_rule_are_refused_before_anything_is_cut():
    for method, said in (
        (
            Ia3(targets=("attention.output",)),
            "attention.output: tensor parallelism has no rule for rescaling outputs there",
        ),
        (Ia3(feed_forward=("query",)), "query: tensor parallelism has no rule for rescaling inputs there"),
        (PrefixTuning(num_tokens=3), "prefix tuning has no rule"),
    ):
        model = apply(small_model("llama"), method)
        before = {name: array.shape for name, array in tree_flatten(model.parameters())}
        with pytest.raises(UsageError, match=said):
            share_tensors(model, Two())
        assert {name: array.shape for name, array in tree_flatten(model.parameters())} == before


def test_what_has_no_rule_is_refused():
    model = small_model("llama")
    with pytest.raises(UsageError, match="tp=3: 4 attention heads"):
        TensorPlan(model.config, 3, 0)
    plan = TensorPlan(model.config, 2, 0)
    with pytest.raises(UsageError, match="no rule for tensor parallelism"):
        plan.piece("decoder.layers.0.attention.output.adapters.default.magnitude", (32,))
    for name in ("head.output.adapters.default.lora_b", "embeddings.token.adapters.default.magnitude"):
        with pytest.raises(UsageError, match="rows are words has no rule"):
            plan.piece(name, (67, 4))
    with pytest.raises(UsageError, match="smaller group size"):
        plan.piece("decoder.layers.0.feed_forward.down.scales", (32, 3))
