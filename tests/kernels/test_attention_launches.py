"""No launch of any kernel is planned to run long enough for the watchdog, and together they cover the call once."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from mlxlm.kernels.attention.device import metal_profile
from mlxlm.kernels.attention.launches import (
    AXES,
    DISPATCH_SECONDS,
    UTILISATION,
    Part,
    Split,
    seconds,
    visible_pairs,
)
from mlxlm.kernels.attention.plan import plan
from mlxlm.kernels.attention.problem import AttentionProblem

M1, M4_MAX = metal_profile("applegpu_g13g"), metal_profile("applegpu_g16s")
BASE = AttentionProblem(
    dtype="bfloat16", batch=1, heads=8, kv_heads=2, query_length=4096, key_length=4096, head_dim=64, value_dim=64
)
LONG = replace(BASE, query_length=65536, key_length=65536)
PROBLEMS = {
    "long": LONG,
    "causal": replace(LONG, causal=True),
    "window": replace(LONG, causal=True, window=1024),
    "one key head": replace(LONG, heads=16, kv_heads=1, head_dim=128, value_dim=128, causal=True),
    "batch": replace(BASE, batch=512, query_length=1024, key_length=1024),
    "wide": replace(LONG, dtype="float32", head_dim=256, value_dim=256),
    "decode": replace(BASE, query_length=8, key_length=2**22, causal=True, query_offset=2**22 - 8),
    "decode a batch": replace(BASE, batch=4096, heads=32, kv_heads=32, query_length=1, key_length=8192),
    "one number for a bias": replace(BASE, bias=True, bias_broadcast=(True,) * 4),
    "bias of keys": replace(LONG, bias=True, bias_broadcast=(False, True, True, False)),
}


@pytest.mark.parametrize("device", [M1, M4_MAX], ids=lambda device: device.name)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_launch_of_every_kernel_is_short_and_none_is_left_out(name, device):
    planned = plan(PROBLEMS[name], device)
    assert set(planned.kernels) == AXES.keys() - {"forward" if planned.decode else "decode"}
    for kernel in planned.kernels:
        tile, parts = planned.tile(kernel), planned.parts(kernel)
        longest = max(seconds(kernel, planned.problem, tile, device, part) for part in parts)
        assert longest <= DISPATCH_SECONDS, kernel
        covered = sum(
            (p.batch[1] - p.batch[0]) * (p.kv_heads[1] - p.kv_heads[0])
            * (p.queries[1] - p.queries[0]) * (p.keys[1] - p.keys[0])
            for p in parts
        )  # fmt: skip
        problem = planned.problem
        assert covered == problem.batch * problem.kv_heads * problem.query_length * problem.key_length
        assert len(set(map(str, parts))) == len(parts)


def test_a_short_call_is_one_launch_of_each_kernel():
    planned = plan(BASE, M4_MAX)
    names = [name for name in planned.kernels if name != "relative_bias_gradient"]
    assert all(planned.parts(name) == [Part.whole(BASE)] for name in names)


def test_no_more_launches_than_needed():
    for device in (M1, M4_MAX):
        planned = plan(LONG, device)
        parts = planned.parts("forward")
        whole = seconds("forward", LONG, planned.forward, device, Part.whole(LONG))
        assert len(parts) <= 1.5 * whole / DISPATCH_SECONDS + 2


def test_the_time_of_a_launch_as_counted_by_hand():
    tile = plan(LONG, M1).forward
    flops = 2 * 8 * 65536**2 * 128
    assert seconds("forward", LONG, tile, M1, Part.whole(LONG)) == pytest.approx(flops / (2.6e12 * UTILISATION))
    gradients = seconds("key_value_gradient", LONG, plan(LONG, M1).dkdv, M1, Part.whole(LONG))
    assert gradients == pytest.approx(2 * flops / (2.6e12 * UTILISATION))
    decoding = replace(BASE, query_length=1, key_length=2**20)
    read = 2 * 2 * (8 * 1 + 2 * 2**20) * 64  # bfloat16, query and key as wide as output and value
    tile = plan(decoding, M1).decode
    assert seconds("decode", decoding, tile, M1, Part.whole(decoding)) == pytest.approx(read / (68e9 * UTILISATION))


def test_few_threadgroups_take_as_long_as_they_would_alone():
    problem = replace(BASE, query_length=64, bias=True, bias_broadcast=(True,) * 4)
    tile, own = plan(problem, M1).dq, replace(problem, bias_broadcast=(False,) * 4)
    one, many = (seconds("bias_gradient", p, tile, M1, Part.whole(p)) for p in (problem, own))
    assert one == pytest.approx(16 * many), "one threadgroup, of the two that each of 8 cores wants"


@pytest.mark.parametrize("offset", [-3, 0, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("causal", [True, False])
def test_visible_pairs_are_those_of_the_definition(causal, window, offset):
    problem = replace(BASE, query_length=9, key_length=11, causal=causal, window=window, query_offset=offset)
    for queries, keys in itertools.product([(0, 9), (2, 5), (8, 9)], [(0, 11), (3, 7), (10, 11)]):
        seen = sum(
            (not causal or j <= i + offset) and (window is None or abs(i + offset - j) < window)
            for i in range(*queries) for j in range(*keys)
        )  # fmt: skip
        assert visible_pairs(problem, queries, keys) == seen
        assert visible_pairs(replace(problem, query_offset=None), queries, keys) >= seen


def test_parts_end_between_blocks():
    problem, tile = replace(BASE, query_length=100, key_length=70), plan(BASE, M1).forward
    parts = Split(queries=3, keys=2).parts(problem, tile)
    assert [(p.queries, p.keys) for p in parts] == [
        (queries, keys) for queries in ((0, 32), (32, 64), (64, 100)) for keys in ((0, 32), (32, 70))
    ]
    assert len(Split(queries=99).parts(problem, tile)) == 4, "no part is smaller than a block"


def test_a_part_of_the_keys_never_gives_final_results():
    few = replace(BASE, batch=64, heads=8, kv_heads=1, query_length=1, key_length=2**25)
    planned = plan(few, M1)
    assert planned.split("decode").keys > 1
    assert planned.decode.splits == 2
    assert plan(replace(few, key_length=2**15), M1).decode.splits == 1
