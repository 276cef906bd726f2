"""Of a checkpoint each process reads the rows and columns that it keeps, and nothing else."""

from __future__ import annotations

import jobs
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from processes import ROOT

from mlxlm.checkpoint import open_safetensors
from mlxlm.checkpoint.stored import NotAView
from mlxlm.models.loading import load_model
from mlxlm.models.weights import permute, rename, shift, split, split_heads, to_canonical, transpose

CASES = jobs.TWO["loaded"][2]


@pytest.mark.parametrize("case", CASES)
def test_a_rank_reads_what_it_keeps(two_ranks, case):
    for got in two_ranks["loaded"]:
        assert got[f"{case}/apart"] == 0
        assert got[f"{case}/kept"] < 0.65 * got[f"{case}/file"]
        if "tp" in case:
            assert got[f"{case}/read"] == got[f"{case}/kept"]
        else:  # ends of shared weights are read once more, to compare them
            assert got[f"{case}/kept"] <= got[f"{case}/read"] < 0.75 * got[f"{case}/file"]


def test_of_quantized_weights_the_groups_that_hold_a_part_are_read(two_ranks):
    for got in two_ranks["loaded"]:
        assert got["quantized tp=2 0 values/apart"] == 0
        assert got["quantized tp=2 0 values/read"] == got["quantized tp=2 0/read"]
        assert got["quantized tp=2 0 values/read"] < 0.5 * got["quantized tp=2 0 values/kept"]


def test_nothing_is_read_past_the_views(two_ranks):
    for got in two_ranks["loaded"]:
        assert got["llama tp=2 0/elsewhere"] < 0.25 * got["llama tp=2 0/file"]


RULES = [
    rename("a", "x"),
    transpose("a", "x"),
    split("a", ("x", "y"), (8, 4)),
    split("a", ("x", "y"), (4, 2), transposed=True),
    split_heads("a", ("x", "y"), 2, (2, 1)),
    permute("a", "x", 3),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_any_part_of_a_view_is_that_of_the_array(tmp_path, rule, dtype):
    whole = mx.random.normal((12, 6)).astype(getattr(mx, dtype))
    mx.save_safetensors(str(tmp_path / "one.safetensors"), {"b": mx.ones(3), "a": whole})
    checkpoint = open_safetensors(tmp_path / "one.safetensors")
    arrays = to_canonical([rule], {"a": whole}).tensors
    views = to_canonical([rule], {"a": checkpoint.stored("a")}).tensors
    assert arrays.keys() == views.keys()
    for name, array in arrays.items():
        view = views[name]
        assert view.shape == array.shape
        assert mx.array_equal(view.read(), array)
        before, rows = view.file.bytes_read, array.shape[0]
        for first, last, left, right in ((0, 1, 0, 1), (1, rows, 0, 2), (rows - 1, rows, 1, 4), (1, 1, 0, 1)):
            part = view.read((first, left), (last, right))
            assert part.dtype == array.dtype
            assert mx.array_equal(part, array[first:last, left:right])
        assert view.file.bytes_read - before == array.itemsize * (1 + 2 * (rows - 1) + 3)


def test_what_is_no_view_says_so(tmp_path):
    arrays = {"a": mx.arange(12, dtype=mx.float32).reshape(3, 4), "b": mx.ones(8), "c": mx.array(5)}
    mx.save_safetensors(str(tmp_path / "one.safetensors"), arrays)
    checkpoint = open_safetensors(tmp_path / "one.safetensors")
    stored = checkpoint.stored("a")
    with pytest.raises(NotAView):
        to_canonical([shift("a", "x", 1.0)], {"a": stored})
    with pytest.raises(NotAView):
        stored.T.reshape(2, 6)
    with pytest.raises(NotAView):
        stored.reshape(3, 2, 2)[:, :1].reshape(-1, 2).reshape(6)
    assert checkpoint.stored("c").read().item() == 5
    np.testing.assert_array_equal(np.array(checkpoint.stored("b").reshape(2, 2, 2).swapaxes(0, 1).reshape(8).read()), 1)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "falcon"])
def test_files_without_views_are_read_all_the_same(name, quantized):
    path = ROOT / "tests" / "fixtures" / "gguf" / f"{name}.gguf"
    whole = dict(tree_flatten(load_model(path, quantized=quantized).parameters()))
    model = load_model(path, quantized=quantized, lazy=True)
    model._stored.finish(model)
    lazy = dict(tree_flatten(model.parameters()))
    assert lazy.keys() == whole.keys()
    assert all(mx.array_equal(array, whole[key]) for key, array in lazy.items())
