"""The plan under a mesh, against numbers worked out by hand and the plan of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_plan import TREE, built, config, quantized

from mlxlm.distributed import Mesh
from mlxlm.errors import UsageError
from mlxlm.training.plan import PlanSettings, predict
from mlxlm.training.plan_machines import (
    LINKS,
    Link,
    Machines,
    bytes_of,
    link_of,
    meshes,
    recommend,
    step_time,
)
from mlxlm.training.plan_mesh import Layout
from mlxlm.training.plan_traffic import predict_mesh

SETTINGS = PlanSettings(batch_size=8, length=512)
# TREE: 4 layers of dim 128, 4 heads and 2 key/value heads of 32, gated feed-forward of 512, 2,000 tied words.
MATRICES = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 512
NORMS, WORDS = 2 * 128, 2000 * 128
ALL = 4 * (MATRICES + NORMS) + WORDS + 128


def plans(settings=SETTINGS, zero=0, schedule="1f1b", tree=TREE, **mesh):
    return predict_mesh(tree, settings, Layout(mesh=Mesh(**mesh), zero=zero, schedule=schedule))


def by_kind(rank):
    return {one.kind: one for one in rank.traffic}


@pytest.mark.parametrize("changes", [{}, {"accumulation": 3, "dtype": "bfloat16", "recompute_layers": 2}], ids=str)
@pytest.mark.parametrize("kind", ["rotary", "both", "encoder"])
def test_one_process_is_the_plan_of_one_process(kind, changes):
    tree, settings = config(kind), replace(SETTINGS, **changes)
    (rank,) = plans(settings, tree=tree)
    assert (rank.memory, rank.traffic) == (predict(tree, settings), ())


def test_frozen_and_quantized_weights_count_as_they_are():
    (rank,) = plans(tree=built(TREE, quantized))
    assert rank.memory == predict(built(TREE, quantized), SETTINGS)


def test_replicas_split_rows_and_sum_gradients():
    (rank,), one = plans(dp=2), predict(TREE, replace(SETTINGS, batch_size=4))
    assert replace(rank.memory, update=one.update) == one
    (sums,) = rank.traffic
    assert (sums.kind, sums.payload, sums.sent) == ("gradients", 4 * ALL, 4 * ALL)  # 2 (n - 1) / n = 1
    assert plans(dp=4)[0].traffic[0].sent == 1.5 * 4 * ALL


def test_zero_shares_state_then_gradients_then_weights():
    first, second, third = (plans(dp=2, zero=zero)[0] for zero in (1, 2, 3))
    for rank in (first, second, third):
        assert rank.memory.optimizer == 2 * 4 * ALL / 2
    assert first.memory.weights == second.memory.weights == 4 * ALL
    in_layers = 4 * (MATRICES + NORMS)
    assert third.memory.weights == 4 * (ALL - in_layers) + 4 * in_layers / 2
    assert {kind: one.operation for kind, one in by_kind(second).items()} == {
        "weights": "gather",
        "gradients": "scatter",
    }
    layers = by_kind(third)["weights of layers"]
    assert (layers.payload, layers.calls) == (2 * 4 * in_layers, 8)  # forward, and again for the gradients
    assert by_kind(third)["gradients of layers"].payload == 4 * in_layers
    several = replace(SETTINGS, accumulation=4)
    summed = [plans(several, dp=2, zero=zero)[0].memory.summed for zero in (0, 1, 2)]
    assert summed == [4 * ALL, 4 * ALL, 2 * ALL]


def test_tensor_ranks_share_matrices_and_words_and_sum_hidden_states():
    (rank,), whole = plans(tp=2), predict(TREE, SETTINGS)
    assert rank.memory.weights == 4 * (4 * (MATRICES / 2 + NORMS) + WORDS / 2 + 128)
    assert rank.memory.loss < 0.7 * whole.loss
    hidden = 4 * 8 * 512 * 128
    found = by_kind(rank)
    assert (found["forward"].payload, found["forward"].calls) == (9 * hidden, 9)  # two a layer, and the embeddings
    assert (found["backward"].payload, found["backward"].calls) == (9 * hidden, 9)  # two a layer, and the head
    again = by_kind(plans(replace(SETTINGS, recompute_layers=3), tp=2)[0])["forward"]
    assert again.payload == (9 + 2 * 3) * hidden


@pytest.mark.parametrize(("schedule", "flights"), [("1f1b", [4, 3, 2, 1]), ("gpipe", [6, 6, 6, 6])])
def test_stages_keep_inputs_by_the_schedule(schedule, flights):
    found = plans(replace(SETTINGS, accumulation=6), schedule=schedule, pp=4)
    assert [rank.in_flight for rank in found] == flights
    hidden = 4 * 8 * 512 * 128
    assert [rank.handed for rank in found] == [0, hidden, hidden, hidden]
    sends = [sum(one.payload for one in rank.traffic if one.operation == "send") for rank in found]
    assert sends == [6 * hidden, 12 * hidden, 12 * hidden, 6 * hidden]
    assert [rank.memory.loss > 0 for rank in found] == [False, False, False, True]
    tied = [by_kind(rank).get("gradients of tied weights") for rank in found]
    assert [one and one.payload for one in tied] == [4 * WORDS, None, None, 4 * WORDS]


def test_sequence_ranks_have_columns_and_a_ring():
    (rank,) = plans(sp=4)
    part = 2 * 8 * 128 * 64  # keys and values of a part: 2 heads of 32
    found = by_kind(rank)
    assert found["ring forward"].payload == 4 * 3 * part * 4
    assert found["ring backward"].payload == 4 * (3 * part * 8 + part * 4)
    assert rank.memory.activations == predict(TREE, replace(SETTINGS, length=128)).activations


def test_arithmetic_is_six_operations_a_weight_and_token_and_attention():
    tokens, attention = 8 * 512, 3 * 4 * 256 * 128 * 4  # of half the keys
    expected = tokens * (6 * (4 * MATRICES + WORDS) + attention)
    assert plans()[0].operations == expected
    assert plans(tp=2)[0].operations == expected / 2


def test_the_time_of_a_step_is_the_cost_model():
    link = Link(1e6, 0.5)
    (rank,) = plans(dp=2)
    time = step_time([rank], 1, link, 1e9)
    assert time.communication == pytest.approx(0.5 + 4 * ALL / 1e6)
    assert time.total == pytest.approx(rank.operations / 1e9 + 0.5 + 4 * ALL / 1e6)
    piped = plans(replace(SETTINGS, accumulation=6), pp=2)
    slowest = step_time(piped, 6, Link(1e30, 0.0), 1.0)
    assert slowest.total == pytest.approx(max(rank.operations for rank in piped) * 7 / 6)


def test_all_meshes_are_looked_at():
    assert len(meshes(8)) == len(set(meshes(8))) == 20  # three factors of 2 in four places
    assert {mesh.size for mesh in meshes(12)} == {12}


def test_a_recommendation_fits_and_says_why_others_do_not():
    machines = Machines(count=4, memory=100 * 10**6, link=LINKS["thunderbolt5"], speed=1e11)
    found = recommend(TREE, SETTINGS, machines)
    times = [one.time.total for one in found.fitting]
    assert times == sorted(times)
    for one in found.fitting:
        plan = predict_mesh(TREE, one.settings, one.layout)
        assert max(rank.memory.peak for rank in plan) == one.peak <= machines.usable
        assert one.settings.batch_size * one.settings.accumulation == 8
    reasons = {str(layout): why for layout, why in found.others}
    assert len(found.fitting) + len(found.others) >= len(meshes(4))
    small = recommend(TREE, SETTINGS, replace(machines, memory=10**6))
    assert small.fitting == ()
    assert "of 750.0 kB" in small.others[0][1]
    six = recommend(TREE, SETTINGS, replace(machines, count=3))
    assert "tp=3: 4 attention heads" in {str(a): b for a, b in six.others}["tp=3"]
    assert reasons.keys().isdisjoint(str(one.layout) for one in found.fitting)


def test_units():
    assert (link_of("10Gb/s").bandwidth, link_of("1.5GB/s").bandwidth) == (1.25e9, 1.5e9)
    assert link_of("thunderbolt5").bandwidth == 10e9
    assert (bytes_of("64GB"), bytes_of("1.5 tb"), bytes_of("500m")) == (64 * 10**9, 1500 * 10**9, 500 * 10**6)
    for wrong in ("thunderbolt6", "10", "0Gb/s", "1..2Gb/s", ""):
        with pytest.raises(UsageError, match="link"):
            link_of(wrong)
    for wrong in ("64XB", "-1GB", "0GB", "."):
        with pytest.raises(UsageError, match="64GB"):
            bytes_of(wrong)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ({"mesh": Mesh(tp=3)}, SETTINGS), ({"mesh": Mesh(pp=5)}, SETTINGS), ({"mesh": Mesh(dp=9)}, SETTINGS),
        ({"mesh": Mesh(dp=2), "zero": 4}, SETTINGS), ({"mesh": Mesh(pp=2), "schedule": "1f2b"}, SETTINGS),
        ({"mesh": Mesh(tp=2)}, replace(SETTINGS, optimizer="muon")), ({"mesh": Mesh(sp=513)}, SETTINGS),
    ],
    ids=str,
)  # fmt: skip
def test_layouts_that_cannot_be_are_refused(layout, settings):
    with pytest.raises(UsageError):
        predict_mesh(TREE, settings, Layout(**layout))
