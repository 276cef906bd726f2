"""The bytes that a plan predicts against those that the ranks of real runs give to their communicators in a step."""

from __future__ import annotations

import jobs
import pytest
from small_models import small_model

from mlxlm.distributed import parse_mesh
from mlxlm.training.plan import PlanSettings
from mlxlm.training.plan_mesh import Layout
from mlxlm.training.plan_traffic import predict_mesh

OPERATIONS = {"sum": "sum", "gather": "stack", "scatter": "reduce_scatter", "send": "send"}


def predicted(case, stage):
    """Payloads of a rank of a stage by group and operation."""
    name, mesh, zero, batches = case.split(" ")
    targets = 0.25 if name == "bert" else 1.0  # 12 of the 48 words of the first batch
    settings = PlanSettings(batch_size=4, length=12, target_length=7, accumulation=int(batches), targets=targets)
    layout = Layout(mesh=parse_mesh(mesh, 4 if case in jobs.SENT_FOUR else 2), zero=int(zero))
    found = {}
    for one in predict_mesh(small_model(name), settings, layout)[stage].traffic:
        key = f"{one.group}/{OPERATIONS[one.operation]}"
        found[key] = found.get(key, 0) + one.payload
    return found


def check(results, case):
    mesh = parse_mesh(case.split(" ")[1], len(results))
    for rank, got in enumerate(results):
        if mesh.place(rank)["tp"]:
            continue  # a plan is of the first of the ranks that share words, which has one more where they don't divide
        counted = {key.removeprefix(f"{case}/"): int(size) for key, size in got.items() if key.startswith(f"{case}/")}
        assert counted == predicted(case, mesh.place(rank)["pp"])


@pytest.mark.parametrize("case", jobs.SENT)
def test_two_ranks_say_as_much_as_predicted(two_ranks, case):
    check(two_ranks["traffic"], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", jobs.SENT_MORE)
def test_other_models_and_stages_of_zero(slow_ranks, case):
    check(slow_ranks(2)["traffic"], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", jobs.SENT_FOUR)
def test_four_ranks(slow_ranks, case):
    check(slow_ranks(4)["traffic"], case)
