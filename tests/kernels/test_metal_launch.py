"""How the Metal kernels are launched: splits, strides, traffic, threadgroup memory, refusals, package data."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from emulation import attention_cases as cases
from emulation import needs_compiler

from mlxlm.kernels import one_token
from mlxlm.kernels.attention import AttentionMask, attention, device, launches, metal, plan
from mlxlm.kernels.attention.metal import operands, source
from mlxlm.kernels.attention.problem import AttentionProblem, describe
from mlxlm.kernels.attention.tile import THREADGROUP_BYTES, threadgroup_arrays
from tools.metal_emulator import translate

ROOT = Path(__file__).resolve().parents[2]


def launched(device, kernel: str) -> int:
    return sum(dispatch.name.endswith(f"_attention_{kernel}") for dispatch in device.dispatches)


_EVERYTHING = cases.Case(
    mask="everything", alibi=True, relative_bias=True, bias="BHLS", sinks=True, dropout=True, dtype="float16"
)


@needs_compiler
def test_a_call_split_over_launches_gives_the_same_bits():
    """Wherever each launch has results of its own."""
    data = cases.make(_EVERYTHING)
    with cases.emulated_attention() as device:
        expected = cases.results(metal.attention, data)
    of_queries = launches.Split(batch=2, kv_heads=2, queries=2)
    splits = dict.fromkeys(("forward", "delta", "query_gradient"), of_queries)
    splits |= {
        "key_value_gradient": launches.Split(batch=2, kv_heads=2, keys=3),
        "bias_gradient": launches.Split(batch=2, kv_heads=2, queries=2, keys=3),
        "relative_bias_gradient": launches.Split(kv_heads=2),
    }
    assert {launched(device, kernel) for kernel in splits} == {1}
    with cases.emulated_attention(splits=splits) as device:
        found = cases.results(metal.attention, data)
    counts = {"key_value_gradient": 12, "bias_gradient": 24, "relative_bias_gradient": 2}
    assert {kernel: launched(device, kernel) for kernel in splits} == dict.fromkeys(splits, 8) | counts
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@needs_compiler
@pytest.mark.parametrize("bias", ["HLS", "B11S", "1"])
def test_launches_whose_results_add_up_give_the_same_sums(bias):
    data = cases.make(replace(_EVERYTHING, bias=bias, dtype="float32", dropout=bias == "HLS"))
    with cases.emulated_attention():
        expected = cases.results(metal.attention, data)
    with cases.emulated_attention(splits=cases.CUT) as device:
        found = cases.results(metal.attention, data)
    assert launched(device, "query_gradient") == 16
    assert launched(device, "key_value_gradient") == 24
    assert launched(device, "relative_bias_gradient") == 8
    assert max(cases.errors(found, expected).values()) < 2e-6
    assert max(cases.errors(found, data.exact).values()) < 1e-4


@needs_compiler
@pytest.mark.parametrize("width", [16, 136], ids=["one pass", "two passes"])
def test_sums_over_launches_are_taken_in_float32(width):
    case = cases.Case(dtype="bfloat16", batch=1, kv_heads=1, queries=70, keys=100, head_dim=width, value_dim=width)
    data = cases.make(case)
    with cases.emulated_attention():
        whole = cases.errors(cases.results(metal.attention, data), data.exact)
    splits = {"query_gradient": launches.Split(keys=9), "key_value_gradient": launches.Split(queries=9)}
    with cases.emulated_attention(splits=splits) as device:
        found = cases.errors(cases.results(metal.attention, data), data.exact)
    assert launched(device, "query_gradient") > 3
    assert all(found[name] <= 1.05 * whole[name] for name in found), (found, whole)


@needs_compiler
@pytest.mark.parametrize("case", cases.DECODE[2:6:2], ids=str)
def test_decoding_split_over_launches_gives_the_same(case):
    data = cases.make(case)
    with cases.emulated_attention():
        expected = cases.results(metal.attention, data)
    splits = {"decode": launches.Split(batch=case.batch, kv_heads=case.kv_heads, keys=3)}
    with cases.emulated_attention(splits=splits) as device:
        found = cases.results(metal.attention, data)
    assert launched(device, "decode") == 3 * case.batch * case.kv_heads
    assert launched(device, "decode_combine") == 1
    assert max(cases.errors(found, expected).values()) <= (1e-5 if case.dtype == "float32" else 2**-7)


@needs_compiler
def test_the_door_leads_to_the_kernels(monkeypatch):
    data = cases.make(cases.Case(mask="segments", sinks=True))
    monkeypatch.setattr(metal, "available", lambda: True)
    with cases.emulated_attention() as device:
        found = cases.results(partial(attention, implementation="metal"), data)
    assert {d.name for d in device.dispatches} >= {"mlxlm_attention_forward", "mlxlm_attention_query_gradient"}
    assert max(cases.errors(found, data.exact).values()) < 1e-5


@needs_compiler
def test_strided_inputs_are_read_in_place(monkeypatch):
    monkeypatch.setattr(mx, "contiguous", lambda array: pytest.fail("a copy") if array.ndim == 4 else array)
    data = cases.make(cases.Case(layout="BLHD", mask="causal"))
    with cases.emulated_attention(keeping=True) as device:
        cases.results(metal.attention, data)
    (forward,) = [d for d in device.dispatches if d.name.endswith("_forward")]
    case = data.case
    assert list(forward.buffers["query_strides"]) == [
        case.queries * case.heads * case.head_dim, case.head_dim, case.heads * case.head_dim, 1
    ]  # fmt: skip


@needs_compiler
def test_the_output_joins_its_heads_without_a_copy():
    data = cases.make(cases.Case())
    with cases.emulated_attention():
        out, _ = metal.attention(*data.inputs.values(), **data.arguments())
    case = data.case
    strides = np.array(out, copy=False).strides
    assert strides == tuple(
        4 * n for n in (case.queries * case.heads * case.value_dim, case.value_dim, case.heads * case.value_dim, 1)
    )


def _forward_counters(case: cases.Case):
    _, device = cases.emulated_results(case)
    return device.counters("mlxlm_attention_forward")


_LONG = cases.Case(batch=1, heads=2, kv_heads=1, queries=256, keys=256, head_dim=64, value_dim=64)


@needs_compiler
@pytest.mark.parametrize("mask", ["plain", "causal", "window", "segments"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forward_pass_reads_and_writes_little_more_than_its_tiles(mask, dtype):
    """Ideal: each block of queries once, each tile of keys and values that it can see once, the output once."""
    case = replace(_LONG, mask=mask, dtype=dtype)
    data = cases.make(case)
    counters = _forward_counters(case)
    tile = plan.plan(_problem(case), device.metal_profile("applegpu_g13g")).forward
    visible = cases.visible(data, np.arange(256)[None])
    visible = np.broadcast_to(visible, (1, 2, 256, 256)).reshape(
        2, 256 // tile.block_queries, tile.block_queries, 256 // tile.block_keys, tile.block_keys
    )
    tiles = int(visible.any(axis=(2, 4)).sum())
    size = 4 if dtype == "float32" else 2
    ideal = 2 * 256 * (64 + 64) * size + tiles * tile.block_keys * (64 + 64) * size
    assert ideal <= counters.device_bytes <= 1.3 * ideal
    assert counters.matrix_operations == tiles * (tile.block_queries // 8) * (tile.block_keys // 8) * (64 + 64) // 8


@needs_compiler
def test_a_causal_mask_costs_at_most_six_tenths_of_a_dense_one():
    long = replace(_LONG, heads=1, queries=512, keys=512)
    dense, causal = (_forward_counters(replace(long, mask=mask)) for mask in ("plain", "causal"))
    assert causal.device_bytes <= 0.6 * dense.device_bytes
    assert causal.matrix_operations <= 0.6 * dense.matrix_operations
    assert causal.threadgroup_barriers <= 0.6 * dense.threadgroup_barriers


@needs_compiler
@pytest.mark.parametrize("mask", ["causal", "window", "segments"])
def test_the_gradients_skip_the_tiles_that_the_mask_empties(mask):
    counted = {}
    for name in ("plain", mask):
        _, device = cases.emulated_results(replace(_LONG, mask=name, relative_bias=True, bias="LS"))
        counted[name] = {d.name: d.counters.matrix_operations for d in device.dispatches}
    for name, dense in counted["plain"].items():
        if dense:
            assert counted[mask][name] <= 0.65 * dense, name


def _problem(case: cases.Case) -> AttentionProblem:
    return AttentionProblem(
        dtype=case.dtype, batch=case.batch, heads=case.heads, kv_heads=case.kv_heads, query_length=case.queries,
        key_length=case.keys, head_dim=case.head_dim, value_dim=case.value_dim,
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("case", [*cases.WIDTHS[::18], cases.DECODE[3]], ids=str)
def test_kernels_take_the_threadgroup_memory_that_the_plan_says(case):
    """As the emulator counts it; it refuses more than 32 KB."""
    case = replace(case, mask="everything", relative_bias=True, alibi=True, dropout=True, bias="B11S")
    data = cases.make(case)
    _, emulated = cases.emulated_results(case)
    arguments = data.arguments()
    arguments.pop("scale")
    problem = describe(*list(data.inputs.values())[:3], **dict(list(data.inputs.items())[3:]), **arguments)
    planned = plan.plan(problem, device.metal_profile(f"applegpu_g{12 + case.generation}g"))
    assert launched(emulated, "decode") == (case.queries <= 8)
    for kernel in planned.kernels:
        taken = {d.counters.threadgroup_memory for d in emulated.dispatches if d.name.endswith(f"_attention_{kernel}")}
        tile = planned.tile(kernel)
        runs = {True} if tile is None or tile.passes == 1 or kernel != "key_value_gradient" else {True, False}
        expected = {
            0 if tile is None else sum(threadgroup_arrays(kernel, tile, problem, compute_dk=dk).values()) for dk in runs
        }
        assert taken == expected, kernel
        assert max(taken) == planned.threadgroup_bytes(kernel) <= THREADGROUP_BYTES


@pytest.mark.parametrize("width", [4, 300])
def test_widths_beyond_the_table_are_refused_by_name(width):
    problem = replace(_problem(cases.Case()), value_dim=width)
    assert metal.serves(problem) == f"value heads are {width} wide; the kernels take 8 to 256"
    assert metal.serves(_problem(cases.Case())) is None


def test_kernel_objects_are_made_once_for_a_configuration(monkeypatch):
    made = []
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **options: made.append(options["name"]))
    source.kernel.cache_clear()
    problem = _problem(cases.Case())
    for length in (64, 128):
        features = source.features(replace(problem, key_length=length), {}, {}, scale=0.5, softcap=None, dropout=0.0)
        shape = source.Shape(block_queries=32, block_keys=16, simdgroups=4)
        source.kernel("forward", features, shape, ("query", "key", "value"), ("out", "lse"))
    source.kernel.cache_clear()
    assert made == ["mlxlm_attention_forward"]


def test_texts_are_plain_ascii_without_double_or_atomics():
    files = sorted(source._FOLDER.glob("*.metal"))
    assert len(files) >= 8
    for file in files:
        assert file.read_bytes().isascii(), file.name
        text = translate.without_comments(file.read_text())
        for word in ("double", "atomic", "\t", "return;"):
            assert word not in text, f"{word!r} in {file.name}"


def test_segment_ranges_enclose_every_key_of_the_segment():
    rng = np.random.default_rng(0)
    for batch_q, batch_k in ((3, 3), (3, 1), (1, 3)):
        query, key = rng.integers(-5, 5, (batch_q, 23)), rng.integers(-3, 7, (batch_k, 31))
        first, last = operands.segment_ranges(mx.array(query), mx.array(key))
        for b, i in np.ndindex(3, 23):
            found = np.flatnonzero(key[b % batch_k] == query[b % batch_q, i])
            expected = (found[0], found[-1]) if found.size else (31, -1)
            assert (int(first[b, i]), int(last[b, i])) == expected


def test_block_bounds_are_the_extremes_of_each_block():
    rng = np.random.default_rng(0)
    bounds = rng.integers(0, 50, (2, 37, 2)).astype(np.int32)
    found = np.array(operands.block_bounds(mx.array(bounds), 8))
    assert found.shape == (2, 5, 4)
    for b, block in np.ndindex(2, 5):
        low, high = bounds[b, 8 * block : 8 * block + 8].T
        assert list(found[b, block]) == [low.min(), low.max(), high.min(), high.max()]


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_arrays_for_kernels_never_fall_into_constant_memory(size):
    found = operands.readable(mx.arange(size))
    assert found.size >= 8
    assert found[:size].tolist() == list(range(size))


def test_without_a_metal_device_it_is_not_available():
    if mx.metal.is_available():
        pytest.skip("this machine has one")
    assert not metal.available()
    query = mx.zeros((1, 1, 16, 16))
    with pytest.raises(RuntimeError, match="Metal"):
        mx.eval(metal.attention(query, query, query, scale=1.0, mask=AttentionMask()))


def test_a_built_wheel_carries_the_kernels(tmp_path):
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "from mlxlm.kernels import one_token\n"
        "from mlxlm.kernels.attention.metal import source\n"
        "assert 'installed' in source.__file__, source.__file__\n"
        "folders = source._FOLDER, one_token.source._FOLDER\n"
        "print(sum(len(f.read_text()) for folder in folders for f in folder.glob('*.metal')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    folders = source._FOLDER, one_token.source._FOLDER
    assert int(done.stdout) == sum(len(f.read_text()) for folder in folders for f in folder.glob("*.metal")) > 0


@pytest.mark.metal
@pytest.mark.parametrize("case", [*cases.ALONE, *cases.DECODE, *cases.PAIRS], ids=str)
def test_on_an_apple_gpu_the_kernels_match_float64(case):
    if not metal.available():
        pytest.skip("needs an Apple GPU")
    data = cases.make(case)
    errors = cases.errors(cases.results(metal.attention, data), data.exact)
    allowed = 1e-4 if case.dtype == "float32" else 8e-2
    assert max(errors.values()) < allowed, errors
