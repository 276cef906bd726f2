"""Meshes: places of ranks, groups, and what is refused with a better choice."""

from __future__ import annotations

import pytest
from training_runs import tiny_model

from mlxlm.distributed import Mesh, parse_mesh
from mlxlm.errors import UsageError


def test_every_rank_has_a_place_and_a_place_has_its_rank():
    mesh = Mesh(dp=2, tp=3, pp=2, sp=2)
    assert mesh.size == 24
    assert [mesh.rank(mesh.place(rank)) for rank in range(24)] == list(range(24))
    assert mesh.place(1) == {"tp": 1, "sp": 0, "dp": 0, "pp": 0}


def test_groups_are_disjoint_and_differ_along_their_axes_only():
    mesh = Mesh(dp=2, tp=2)
    assert mesh.groups("tp") == [(0, 1), (2, 3)]
    assert mesh.groups("dp") == [(0, 2), (1, 3)]
    assert mesh.groups("dp", "tp") == [(0, 1, 2, 3)]
    assert mesh.groups("pp") == [(0,), (1,), (2,), (3,)]
    with pytest.raises(UsageError, match="no axis 'td'"):
        mesh.groups("td")


def test_texts_become_meshes_and_dp_takes_what_is_left():
    assert parse_mesh("dp=2, TP=2", 4) == Mesh(dp=2, tp=2)
    assert parse_mesh("tp=2", 8) == Mesh(dp=4, tp=2)
    assert parse_mesh("auto", 3) == parse_mesh(None, 3) == Mesh(dp=3)
    assert str(Mesh(dp=2, pp=2)) == "dp=2,pp=2"
    assert str(Mesh()) == "dp=1"


@pytest.mark.parametrize(
    ("text", "world", "said"),
    [
        ("dp=2,tp=3", 4, "is for 6 processes, but there are 4; --mesh dp=2,tp=2 would do"),
        ("dp=3", 4, "--mesh dp=4 would do"),
        ("xx=2", 2, "there is no axis 'xx'; there are dp"),
        ("dp=2,dp=1", 2, "dp is there twice"),
        ("dp", 2, "is not AXIS=NUMBER"),
        ("dp=0", 2, "expected at least 1"),
        ("", 2, "is not AXIS=NUMBER"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(text, world, said):
    with pytest.raises(UsageError, match="--mesh") as caught:
        parse_mesh(text, world)
    assert said in str(caught.value)


def test_a_mesh_is_checked_against_the_model():
    config = tiny_model(num_attention_heads=6, num_key_value_heads=3, hidden_size=24).config
    Mesh(tp=3, pp=2).check(config)
    Mesh(tp=6).check(config)  # each of three key/value heads on two ranks
    with pytest.raises(UsageError, match=r"tp=4: 6 attention heads .*tp=3 or tp=6 would do"):
        Mesh(tp=4).check(config)
    with pytest.raises(UsageError, match=r"tp=2: 3 key/value heads .*tp=1 or tp=3 would do"):
        Mesh(tp=2).check(config)
    with pytest.raises(UsageError, match="pp=3: the model has 2 layers"):
        Mesh(pp=3).check(config)
