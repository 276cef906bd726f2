"""The emulator must run correct kernels correctly and stop at everything that no Metal kernel may do."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tools.metal_emulator import EmulationError, Metal, emulated_metal
from tools.metal_emulator.compiler import CompileError

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def run(
    body: str, *inputs: mx.array, out: tuple[int, ...] = (64,), dtype: mx.Dtype = mx.float32, threads: int = 64,
    groups: int = 1, header: str = "", seed: int = 0,
) -> tuple[np.ndarray, Metal]:  # fmt: skip
    """Run a kernel body on inputs a, b, ...; its output is `out`."""
    with emulated_metal(seed=seed) as device:
        kernel = mx.fast.metal_kernel(
            name="probe", input_names=list("abc"[: len(inputs)]), output_names=["out"], source=body,
            header=f"#include <metal_simdgroup_matrix>\n{header}", ensure_row_contiguous=False,
        )  # fmt: skip
        (found,) = kernel(
            inputs=list(inputs), output_shapes=[out], output_dtypes=[dtype], grid=(threads * groups, 1, 1),
            threadgroup=(threads, 1, 1),
        )  # fmt: skip
    return np.array(found.astype(mx.float32) if dtype == mx.bfloat16 else found), device


REVERSE = f"""
    threadgroup float tile[64];
    const uint i = thread_position_in_threadgroup.x;
    tile[i] = a[i];
    {BARRIER}
    out[i] = tile[63 - i];
"""
NUMBERS = mx.arange(64, dtype=mx.float32)


@pytest.mark.parametrize("seed", range(3))
def test_threads_exchange_through_threadgroup_memory(seed):
    found, device = run(REVERSE, NUMBERS, seed=seed)
    assert found.tolist() == list(range(63, -1, -1))
    counters = device.dispatches[0].counters
    assert counters.threadgroup_barriers == 1
    assert counters.threadgroup_memory == 256
    assert (counters.device_bytes_read, counters.device_bytes_written) == (256, 256)
    assert (counters.threadgroup_bytes_read, counters.threadgroup_bytes_written) == (256, 256)


# Threads that exchange nothing, so that where they wait is all that can be wrong.
MEET = f"""
    const uint i = thread_position_in_threadgroup.x;
    {BARRIER}
    out[i] = 1.0f;
"""

WRONG = {
    "removed barrier": (REVERSE.replace(BARRIER, ""), "data race|uninitialised"),
    "barrier that orders nothing": (REVERSE.replace("mem_threadgroup", "mem_none"), "data race|uninitialised"),
    "barrier of the other memory": (REVERSE.replace("mem_threadgroup", "mem_device"), "data race|uninitialised"),
    "barrier of the simdgroup only": (REVERSE.replace("threadgroup_barrier", "simdgroup_barrier"), "data race|uninit"),
    "write after read": (f"{REVERSE} tile[i] = 0.0f;", "data race: a (write after a read|read after a write)"),
    "write after write": ("threadgroup float t[1]; t[0] = float(thread_position_in_grid.x);", "a write after a write"),
    "read past the end": (REVERSE.replace("a[i]", "a[i + 1]"), "out of bounds: a read of 4 bytes at byte 256"),
    "read before the start": (REVERSE.replace("a[i]", "a[int(i) - 1]"), "out of bounds: a read of 4 bytes at byte -4"),
    "write past the end": (REVERSE.replace("out[i]", "out[i + 1]"), "out of bounds: a write of 4 bytes at byte 256"),
    "read past a tile": (REVERSE.replace("63 - i", "64 - i"), "out of bounds.* of threadgroup array 'tile' of 256"),
    "nobody wrote it": (REVERSE.replace("tile[i] =", "if (i != 5) tile[i] ="), "uninitialised: byte 20 .* 'tile'"),
    "divergent barrier": (MEET.replace(BARRIER, f"if (i < 32) {{ {BARRIER} }}"), "divergent"),
    "divergent barrier in a simdgroup": (MEET.replace(BARRIER, f"if (i % 2) {{ {BARRIER} }}"), "divergent"),
    "two barriers": (
        MEET.replace(BARRIER, f"if (i < 32) {{ {BARRIER} }} else {{\n {BARRIER} }}"), "different barriers, at lines"
    ),
    "early return": (MEET.replace(BARRIER, f"if (i == 63) return; {BARRIER}"), "divergent: .* have returned"),
    "half a simdgroup": (
        "const uint i = thread_position_in_threadgroup.x; if (i % 32 < 16) out[i] = simd_sum(a[i] + 0.0f);", "divergent"
    ),
    "operation against barrier": (
        f"const uint i = thread_index_in_simdgroup; float x = a[i]; if (i < 9) x = simd_max(x); else {{ {BARRIER} }}",
        "divergent",
    ),
    "different operations": (
        "const uint i = thread_index_in_simdgroup; float x = a[i]; x = i < 9 ? simd_max(x) : simd_min(x); out[i] = x;",
        "divergent: lanes of one simdgroup meet in different operations",
    ),
    "two writers": ("out[0] = float(thread_position_in_threadgroup.x);", "two writers: byte 0 of output 'out'"),
    "too much memory": ("threadgroup float t[8193]; t[thread_position_in_grid.x] = 0.0f;", "take 32772 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_stopped(name):
    body, message = WRONG[name]
    with pytest.raises(EmulationError, match=message):
        run(body, NUMBERS)


def test_two_threadgroups_that_write_one_output_are_stopped():
    with pytest.raises(EmulationError, match="two writers"):
        run("out[thread_position_in_threadgroup.x] = 1.0f;", groups=2)


def test_a_write_to_an_input_does_not_compile():
    with pytest.raises(CompileError, match="const"):
        run("a[0] = 1.0f;", NUMBERS)


def test_a_barrier_of_the_simdgroup_orders_its_own_lanes():
    body = """
        threadgroup float tile[64];
        const uint i = thread_position_in_threadgroup.x;
        tile[i] = a[i];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = tile[i ^ 31];
    """
    found, device = run(body, NUMBERS)
    assert found.tolist() == [i ^ 31 for i in range(64)]
    assert device.dispatches[0].counters.simdgroup_barriers == 2


def test_what_a_kernel_does_not_write_is_nan():
    found, _ = run("if (thread_position_in_grid.x % 2) out[thread_position_in_grid.x] = 1.0f;")
    assert np.isnan(found[::2]).all()
    assert (found[1::2] == 1).all()


def test_what_lies_between_the_elements_of_a_strided_input_is_nan():
    whole = mx.arange(128, dtype=mx.float32).reshape(64, 2)
    body = "const uint i = thread_position_in_grid.x; out[i] = a[i * a_strides[0]];"
    assert run(body, whole[:, 0])[0].tolist() == list(range(0, 128, 2))
    wrong, _ = run("const uint i = thread_position_in_grid.x; out[i] = a[i];", whole[:, 0])
    assert np.isnan(wrong[1::2]).all()


def test_a_grid_that_is_no_multiple_of_its_threadgroup_is_refused():
    with emulated_metal():
        kernel = mx.fast.metal_kernel(
            name="probe", input_names=[], output_names=["out"], source="out[thread_position_in_grid.x] = 0.0f;"
        )
        where = {"grid": (65, 1, 1), "threadgroup": (32, 1, 1)}
        with pytest.raises(EmulationError, match="axis 0 of the grid has 65 threads, not a multiple"):
            kernel(inputs=[], output_shapes=[(65,)], output_dtypes=[mx.float32], **where)


def test_simdgroup_operations():
    body = """
        const uint i = thread_index_in_simdgroup;
        const float x = a[i];
        out[0 * 32 + i] = simd_sum(x);
        out[1 * 32 + i] = simd_max(x);
        out[2 * 32 + i] = simd_min(x);
        out[3 * 32 + i] = simd_shuffle_xor(x, ushort(9));
        out[4 * 32 + i] = simd_shuffle(x, ushort(7));
        out[5 * 32 + i] = simd_shuffle_down(x, ushort(3));
        out[6 * 32 + i] = simd_shuffle_up(x, ushort(3));
    """
    x = np.random.default_rng(0).integers(-99, 99, 32).astype(np.float32)
    found, device = run(body, mx.array(x), out=(7, 32), threads=32)
    lane = np.arange(32)
    np.testing.assert_array_equal(found[:3], np.repeat([[x.sum()], [x.max()], [x.min()]], 32, axis=1))
    np.testing.assert_array_equal(found[3], x[lane ^ 9])
    np.testing.assert_array_equal(found[4], np.full(32, x[7]))
    np.testing.assert_array_equal(found[5, :29], x[3:])
    np.testing.assert_array_equal(found[6, 3:], x[:29])
    assert device.dispatches[0].counters.simdgroup_operations == 7


def test_matrices_multiply_with_the_lane_map_of_mlx():
    """The map is in MLX's own headers (steel/attn/mma.h), written here once more."""
    body = """
        const uint lane = thread_index_in_simdgroup;
        const int row = (lane / 4 & 4) + (lane / 2) % 4, column = (lane / 4 & 2) * 2 + (lane % 2) * 2;
        simdgroup_matrix<float, 8, 8> x, y, z;
        x.thread_elements()[0] = a[row * 8 + column];
        x.thread_elements()[1] = a[row * 8 + column + 1];
        simdgroup_load(y, b, b_strides[0], 0, true);
        z = simdgroup_matrix<float, 8, 8>(2.0f);
        simdgroup_multiply_accumulate(z, x, y, z);
        simdgroup_store(z, out, 8);
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((8, 8), dtype=np.float32), rng.standard_normal((8, 8), dtype=np.float32)
    found, device = run(body, mx.array(a), mx.array(b), out=(8, 8), threads=32)
    np.testing.assert_allclose(found, a.astype(np.float64) @ b.T + 2 * np.eye(8), rtol=1e-6, atol=1e-6)
    assert device.dispatches[0].counters.matrix_operations == 1


def _every_16_bits() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_every_16_bit_number_becomes_the_same_float(dtype):
    bits = _every_16_bits()
    numbers = mx.array(bits).view(dtype)
    body = "const uint i = thread_position_in_grid.x; out[i] = float(a[i]);"
    found, _ = run(body, numbers, out=(65536,), groups=1024)
    np.testing.assert_array_equal(found, np.array(numbers.astype(mx.float32)))


@pytest.mark.parametrize(("dtype", "name"), [(mx.float16, "half"), (mx.bfloat16, "bfloat16_t")], ids=["half", "bfloat"])
def test_floats_are_rounded_to_16_bits_as_numpy_and_mlx_do(dtype, name):
    rng = np.random.default_rng(0)
    every = np.array(mx.array(_every_16_bits()).view(dtype).astype(mx.float32))
    finite = np.sort(every[np.isfinite(every)])
    ties = (finite[:-1].astype(np.float64) + finite[1:]) / 2
    scattered = rng.standard_normal(4096) * 2.0 ** rng.integers(-30, 30, 4096)
    special = [np.inf, -np.inf, 65519, 65520, 1e38]
    numbers = np.concatenate([ties, np.nextafter(ties, np.inf), scattered, special]).astype(np.float32)
    numbers = np.concatenate([numbers, np.zeros(-len(numbers) % 64, dtype=np.float32)])
    body = f"const uint i = thread_position_in_grid.x; out[i] = {name}(a[i]);"
    found, _ = run(body, mx.array(numbers), out=numbers.shape, dtype=dtype, groups=len(numbers) // 64)
    expected = np.array(mx.array(numbers).astype(dtype).astype(mx.float32))
    if dtype == mx.float16:
        with np.errstate(over="ignore"):
            expected = numbers.astype(np.float16)
    np.testing.assert_array_equal(found, expected)


def test_small_arrays_come_in_constant_memory_as_mlx_passes_them():
    body = "const uint i = thread_position_in_grid.x; out[i] = a[i % 7] + float(a_shape[0] + a_ndim);"
    found, device = run(body, mx.arange(7, dtype=mx.float32))
    assert found[8] == 1 + 7 + 1
    (space,) = {argument.space for argument in device.dispatches[0].kernel.arguments if argument.name == "a"}
    assert space == "constant"
    assert device.dispatches[0].counters.device_bytes_read == 0
