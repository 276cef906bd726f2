"""Sums of squares: of every dtype and size, and what happens where there is no kernel."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.kernels import squares
from mlxlm.kernels.squares import square_sums


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (33, 40), (5, 3, 8), ()], ids=str)
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_the_parts_add_up_to_the_sum_of_all_squares(shape, dtype, on, monkeypatch):
    # Where there is no such device the kernel doesn't work, and MLX's operations serve.
    monkeypatch.setattr(squares, "backend", lambda: on)
    squares._kernel_works.cache_clear()
    x = mx.array(np.random.default_rng(0).normal(size=shape).astype(np.float32)).astype(dtype)
    expected = (np.array(x.astype(mx.float32), dtype=np.float64) ** 2).sum()
    found = square_sums(x)
    assert (found.dtype, found.ndim) == (mx.float32, 1)
    assert found.sum().item() == pytest.approx(expected, rel=1e-5)


def blocked(x):
    """What the kernel computes, block by block and thread by thread."""
    flat = np.array(x.astype(mx.float32), dtype=np.float64).reshape(-1)
    at_once = 16 // x.itemsize
    blocks = min(squares._BLOCKS, -(-x.nbytes // (16 * squares._THREADS)))
    owner = np.arange(flat.size // at_once) % (blocks * squares._THREADS) // squares._THREADS
    sums = np.zeros(blocks)
    np.add.at(sums, np.repeat(owner, at_once), flat**2)
    return mx.array(sums.astype(np.float32))


def test_a_kernel_that_works_is_used_where_its_groups_fit(monkeypatch):
    used = []
    monkeypatch.setattr(squares, "backend", lambda: "cuda")
    monkeypatch.setattr(squares, "_by_kernel", lambda x: used.append(x.shape) or blocked(x))
    squares._kernel_works.cache_clear()
    try:
        assert squares._kernel_works()
        used.clear()
        x = mx.random.normal((70, 64))
        assert square_sums(x).sum().item() == pytest.approx(x.square().sum().item(), rel=1e-5)
        square_sums(x[:3, :3])
        assert used == [(70, 64)]
    finally:
        squares._kernel_works.cache_clear()


@pytest.mark.parametrize("wrong", [lambda x: mx.array([1.0]), None], ids=["wrong", "fails"])
def test_a_kernel_that_does_not_work_is_not_used(wrong, monkeypatch):
    def fail(x):
        raise RuntimeError("Failed to compile kernel")

    monkeypatch.setattr(squares, "backend", lambda: "cuda")
    monkeypatch.setattr(squares, "_by_kernel", wrong or fail)
    squares._kernel_works.cache_clear()
    try:
        assert square_sums(mx.ones((64,))).tolist() == [64.0]
    finally:
        squares._kernel_works.cache_clear()
