"""mx.fast and the tiled path against the reference: outputs and every gradient, all masks and modifiers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import mlx.core as mx
import pytest
from attention_oracle import MASKS, as_float64, attention64, inputs, modifiers, relative_error, split
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlm.kernels import AttentionMask, attention
from mlxlm.kernels.attention import tiled
from mlxlm.kernels.attention.blocks import HeadGroup, ranges
from mlxlm.kernels.attention.device import CPU, CUDA

MODIFIERS = tuple(modifiers(1, 1, 1))
MLX_MODIFIERS = tuple(name for name in MODIFIERS if name not in ("softcap", "dropout"))


def all_groups(problem, batch: int, heads: int, rows: int) -> list[HeadGroup]:
    """Groups of at most so many rows of the batch and key heads, each with blocks of so many queries."""
    blocks = ranges(problem.query_length, rows)
    return [
        HeadGroup(batch=b, heads=h, rows=blocks)
        for b in ranges(problem.batch, batch)
        for h in ranges(problem.kv_heads, heads)
    ]


@pytest.fixture
def small_blocks(monkeypatch):
    """A function that makes the tiled path use one head at a time in blocks of so many rows (5 unless called)."""

    def use(rows: int, backward_rows: int | None = None) -> None:
        def groups(problem, device, scores_alive):
            size = rows if scores_alive == tiled._FORWARD_SCORES else backward_rows or rows
            return all_groups(problem, 1, 1, size)

        monkeypatch.setattr(tiled, "head_groups", groups)

    use(5)
    return use


def outputs_and_gradients(implementation: str, arrays, options, mask, use_lse: bool) -> dict[str, mx.array]:
    """Output, LSE when asked for, and the gradient of a generic loss of them for each array."""

    def loss(arrays):
        out = attention(**arrays, **options, mask=mask, implementation=implementation, return_lse=use_lse)
        out, lse = out if use_lse else (out, mx.array(0.0))
        wave = mx.cos(mx.arange(out.size)).reshape(out.shape)
        tilt = mx.sin(mx.arange(lse.size)).reshape(lse.shape)
        finite = mx.where(lse == mx.inf, 0.0, lse)
        return (out.astype(mx.float32) * wave).sum() + (finite * tilt).sum(), out, lse

    (_, out, lse), gradients = mx.value_and_grad(loss)(arrays)
    return {"out": out, "lse": lse, **{f"d_{name}": array for name, array in gradients.items()}}


def assert_same(implementation: str, arrays, options, mask, use_lse: bool, tolerance: float = 2e-5) -> None:
    got = outputs_and_gradients(implementation, arrays, options, mask, use_lse)
    expected = outputs_and_gradients("reference", arrays, options, mask, use_lse)
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors
    assert {name: (a.shape, a.dtype) for name, a in got.items()} == {
        name: (a.shape, a.dtype) for name, a in expected.items()
    }


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_tiled_matches_the_reference(mask, modifier, small_blocks):
    small_blocks(3, 2)
    arrays, options = split(inputs(), modifiers(4, 5, 7)[modifier])
    assert_same("tiled", arrays, options, MASKS[mask](5, 7), use_lse=True)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("modifier", MLX_MODIFIERS)
def test_mlx_matches_the_reference(mask, modifier):
    arrays, options = split(inputs(), modifiers(4, 5, 7)[modifier])
    assert_same("mlx", arrays, options, MASKS[mask](5, 7), use_lse=False)


@pytest.mark.parametrize("pair", list(combinations(MODIFIERS[1:], 2)), ids="+".join)
def test_tiled_matches_the_reference_for_pairs_of_modifiers(pair, small_blocks):
    small_blocks(2)
    first, second = (modifiers(4, 5, 7)[name] for name in pair)
    if first.keys() & second.keys():
        second = {"bias": first["bias"] + second["bias"]}
    arrays, options = split(inputs(), first | second)
    assert_same("tiled", arrays, options, MASKS["everything"](5, 7), use_lse=True)


def test_relative_bias_in_blocks_of_one_row(small_blocks):
    small_blocks(1)
    arrays, options = split(inputs(L=3, S=1), modifiers(4, 3, 1)["relative-bias"])
    assert_same("tiled", arrays, options, AttentionMask(), use_lse=True)


def test_every_modifier_at_once(small_blocks):
    small_blocks(2, 4)
    merged = {}
    for options in modifiers(4, 5, 7).values():
        merged |= options
    arrays, options = split(inputs(), merged)
    assert_same("tiled", arrays, options, MASKS["everything"](5, 7), use_lse=True)


SHAPES = {
    "one": {"H": 1, "K": 1, "L": 1, "S": 1, "D": 1, "E": 1},
    "prime": {"H": 6, "K": 3, "L": 13, "S": 13, "D": 7, "E": 11},
    "more-queries-than-keys": {"L": 11, "S": 3},
    "multi-query": {"H": 4, "K": 1, "L": 9, "S": 9},
    "decode": {"L": 1, "S": 17},
    **{f"width-{d}": {"H": 2, "K": 1, "L": 6, "S": 6, "D": d, "E": d} for d in (72, 80, 96, 112)},
    "wide-values": {"D": 16, "E": 40},
}


@pytest.mark.parametrize("implementation", ["mlx", "tiled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape, implementation, small_blocks):
    arrays = inputs(**SHAPES[shape])
    L, S = arrays["query"].shape[2], arrays["key"].shape[2]
    for mask in (AttentionMask(), AttentionMask(causal=True), MASKS["lengths"](L, S)):
        assert_same(implementation, arrays, {}, mask, use_lse=implementation == "tiled")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["mlx", "tiled", "reference"])
def test_sixteen_bits_are_as_good_as_a_dense_computation_in_them(implementation, dtype):
    arrays = inputs(L=20, S=20, D=16, E=16, dtype=dtype)
    mask = MASKS["segments"](20, 20)

    def dense(arrays):
        key, value = (mx.repeat(arrays[name], 2, axis=1) for name in ("key", "value"))
        score = (arrays["query"] * 0.25) @ key.swapaxes(-1, -2)
        score = mx.where(mask.dense(2, 20, 20), score, mx.array(-1e4, dtype))
        return mx.softmax(score, axis=-1) @ value

    def ours(arrays):
        return attention(**arrays, mask=mask, implementation=implementation)

    exact, _ = attention64(as_float64(arrays), mask, {})
    out = ours(arrays)
    assert out.dtype == dtype
    assert relative_error(out, exact) <= 2 * relative_error(dense(arrays), exact)

    def gradients(function: Callable, arrays):
        return mx.grad(lambda arrays: function(arrays).astype(mx.float32).square().sum())(arrays)

    in_float32 = {name: array.astype(mx.float32) for name, array in arrays.items()}
    expected = gradients(lambda arrays: attention(**arrays, mask=mask, implementation="reference"), in_float32)
    plain, got = gradients(dense, arrays), gradients(ours, arrays)
    for name in arrays:
        assert got[name].dtype == dtype
        assert relative_error(got[name], expected[name]) <= 2 * relative_error(plain[name], expected[name]), name


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_the_branch_for_gpus_gives_the_same(modifier, dtype, small_blocks, monkeypatch):
    """On GPUs products run in the dtype of the query and hidden scores are finite; forced here on the CPU."""
    monkeypatch.setattr(tiled, "device_profile", lambda backend: CUDA)
    small_blocks(2, 3)
    for mask in ("causal-negative-offset", "everything"):
        arrays, options = split(inputs(dtype=dtype), modifiers(4, 5, 7)[modifier])
        tolerance = 2e-5 if dtype == mx.float32 else 0.05
        assert_same("tiled", arrays, options, MASKS[mask](5, 7), use_lse=True, tolerance=tolerance)


@pytest.mark.parametrize("implementation", ["reference", "mlx", "tiled"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_query_that_sees_no_key_gives_zero_and_zero_gradients(implementation, dtype):
    arrays = inputs(L=4, S=4, E=8, dtype=dtype)
    mask = AttentionMask(causal=True, query_offset=-1, key_lengths=mx.array([3, 0]))
    out = attention(**arrays, mask=mask, implementation=implementation)
    assert (out[0, :, 0] == 0).all().item()
    assert (out[1] == 0).all().item()
    assert (out[0, :, 1:] != 0).all().item()

    def loss(arrays):
        return attention(**arrays, mask=mask, implementation=implementation).astype(mx.float32).square().sum() + 1.0

    gradients = mx.grad(loss)(arrays)
    for gradient in gradients.values():
        assert mx.isfinite(gradient.astype(mx.float32)).all().item()
        assert (gradient[1] == 0).all().item()
    assert (gradients["query"][0, :, 0] == 0).all().item()
    if implementation != "mlx":
        _, lse = attention(**arrays, mask=mask, implementation=implementation, return_lse=True)
        assert (lse[1] == mx.inf).all().item()
        assert mx.isfinite(lse[0, :, 1:]).all().item()


def test_the_lse_of_an_empty_row_sends_no_gradient(small_blocks):
    """Not even where the loss makes its cotangent infinite."""
    arrays = inputs(L=4, S=4)
    mask = AttentionMask(causal=True, query_offset=-2)
    sinks = mx.array([0.1, 0.2, 0.3, 0.4])

    def loss(arrays, sinks):
        _, lse = attention(**arrays, mask=mask, sinks=sinks, implementation="tiled", return_lse=True)
        return lse.square().sum()

    gradients, d_sinks = mx.grad(loss, argnums=(0, 1))(arrays, sinks)
    assert all(mx.isfinite(g).all().item() for g in (*gradients.values(), d_sinks))
    assert (gradients["query"][:, :, :2] == 0).all().item()


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_a_bias_of_minus_infinity_hides_keys_as_a_mask_does(device, small_blocks, monkeypatch):
    monkeypatch.setattr(tiled, "device_profile", lambda backend: device)
    arrays = inputs()
    bias = mx.where(mx.arange(7) < mx.array([[[[0]]], [[[3]]]]), 0.0, -mx.inf)
    mask = AttentionMask(key_lengths=mx.array([0, 3]))
    got = outputs_and_gradients("tiled", arrays, {"bias": bias}, AttentionMask(), use_lse=True)
    expected = outputs_and_gradients("reference", arrays, {}, mask, use_lse=True)
    assert max(relative_error(got[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize("implementation", ["reference", "tiled", "mlx"])
def test_strided_inputs_and_transposed_layouts(implementation):
    straight = inputs(L=6, S=6, E=8)
    views = {name: mx.contiguous(array.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for name, array in straight.items()}
    mask = AttentionMask(causal=True, window=3)
    expected = attention(**straight, mask=mask, implementation="reference")
    assert relative_error(attention(**views, mask=mask, implementation=implementation), expected) < 1e-5


def test_tiled_in_a_checkpointed_function(small_blocks):
    arrays, options = split(inputs(), {"relative_bias": mx.random.normal((4, 11)), "dropout": 0.2})
    mask, key = MASKS["everything"](5, 7), mx.random.key(2)

    def block(arrays):
        return attention(**arrays, **options, mask=mask, dropout_key=key, implementation="tiled")

    expected = mx.grad(lambda arrays: block(arrays).square().sum())(arrays)
    got = mx.grad(lambda arrays: mx.checkpoint(block)(arrays).square().sum())(arrays)
    assert all(relative_error(got[name], expected[name]) < 1e-6 for name in arrays)


def test_tiled_in_a_compiled_training_step():
    """Mask arrays are arguments here, so that a mask must not evaluate them."""
    arrays = inputs(H=2, K=1, L=40, S=40)

    def loss(arrays, lengths):
        mask = AttentionMask(causal=True, key_lengths=lengths)
        return attention(**arrays, mask=mask, implementation="tiled").square().sum()

    compiled = mx.compile(mx.value_and_grad(loss))
    for lengths in (mx.array([40, 3]), mx.array([7, 0])):
        expected, got = mx.value_and_grad(loss)(arrays, lengths), compiled(arrays, lengths)
        assert abs(got[0].item() - expected[0].item()) < 1e-3
        assert all(relative_error(got[1][name], expected[1][name]) < 1e-5 for name in arrays)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tiled_matches_the_reference_for_random_configurations(data):
    integers = st.integers
    K = data.draw(integers(1, 3), "key heads")
    sizes = {
        "H": K * data.draw(integers(1, 3), "group"),
        "K": K,
        "L": data.draw(integers(1, 9), "queries"),
        "S": data.draw(integers(1, 9), "keys"),
        "D": data.draw(integers(1, 9), "width"),
        "E": data.draw(integers(1, 9), "value width"),
    }
    L, S = sizes["L"], sizes["S"]

    def maybe(strategy):
        return data.draw(st.none() | strategy)

    def pair(low, high):
        return st.lists(integers(low, high), min_size=2, max_size=2)

    ids = maybe(st.just(True)) and [
        data.draw(st.lists(st.lists(integers(0, 2), min_size=n, max_size=n), min_size=2, max_size=2)) for n in (L, S)
    ]
    mask = AttentionMask(
        causal=data.draw(st.booleans(), "causal"),
        query_offset=maybe(integers(-3, 9) | pair(-3, 9)),
        window=maybe(integers(1, 9)),
        prefix_lengths=maybe(pair(0, S)),
        key_lengths=maybe(pair(0, S)),
        query_segments=ids[0] if ids else None,
        key_segments=ids[1] if ids else None,
    )
    arrays = inputs(**sizes, seed=data.draw(integers(0, 99), "seed"))
    chosen = data.draw(st.lists(st.sampled_from(MODIFIERS), max_size=3), "modifiers")
    merged = {}
    for name in chosen:
        merged |= modifiers(sizes["H"], L, S)[name]
    arrays, options = split(arrays, merged)
    rows = data.draw(integers(1, 9), "rows")
    batch, heads = data.draw(st.sampled_from([(2, K), (1, K), (1, 1), (1, 2)]), "group of heads")
    original = tiled.head_groups
    tiled.head_groups = lambda problem, device, alive: all_groups(problem, batch, heads, rows)
    try:
        assert_same("tiled", arrays, options, mask, use_lse=True, tolerance=1e-4)
    finally:
        tiled.head_groups = original
