"""Products of a few rows are those of MLX, in blocks or not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.kernels import few_rows
from mlxlm.kernels.few_rows import few_rows_product


@pytest.fixture(params=[True, False], ids=["blocks", "plain"])
def blocks(request, monkeypatch):
    """Whether products are cut into blocks, small ones too."""
    monkeypatch.setattr(few_rows, "pays", lambda: request.param)
    monkeypatch.setattr(few_rows, "_SMALL", 3000)
    monkeypatch.setattr(few_rows, "_SMALL_AND_SHORT", 0)
    few_rows._block.cache_clear()
    yield request.param
    few_rows._block.cache_clear()


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (9, 24)], ids=str)
@pytest.mark.parametrize("outputs", [192, 191, 7, 640])
def test_the_product_is_that_of_the_whole(blocks, shape, outputs):
    drawn = np.random.default_rng(0)
    x, weight = drawn.standard_normal(shape), drawn.standard_normal((outputs, 24))
    found = few_rows_product(mx.array(x, dtype=mx.float32), mx.array(weight, dtype=mx.float32))
    assert found.shape == (*shape[:-1], outputs)
    np.testing.assert_allclose(np.array(found), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_large_weights_are_cut_into_equal_parts(blocks):
    size = few_rows._block(192, 24, 1)
    assert size == (96 if blocks else 0)
    assert few_rows._block(191, 24, 1) == 0  # a prime number of rows
    assert few_rows._block(64, 24, 1) == 0  # small as it is


def test_gradients_go_through(blocks):
    drawn = np.random.default_rng(0)
    x, weight = (mx.array(drawn.standard_normal(s), dtype=mx.float32) for s in ((2, 24), (192, 24)))
    found = mx.grad(lambda x, w: few_rows_product(x, w).square().sum(), argnums=(0, 1))(x, weight)
    wanted = mx.grad(lambda x, w: (x @ w.T).square().sum(), argnums=(0, 1))(x, weight)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-3)
