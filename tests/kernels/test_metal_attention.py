"""The Metal kernels, run by the emulator through the code that launches them, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from emulation import attention_cases as cases
from emulation import needs_compiler

from mlxlm.kernels.attention import metal

pytestmark = needs_compiler

_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # from 1 to the next number
_WIDTHS = [
    case for case in cases.WIDTHS if (case.dtype, case.generation) in (("float32", 1), ("bfloat16", 3))
    and (case.head_dim, case.value_dim) in ((8, 8), (72, 72), (128, 128), (192, 128), (256, 256))
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Build the kernels of all cases below at once, on all cores."""
    cases.build([*cases.ALONE, *cases.DECODE, *cases.PAIRS, *_WIDTHS])


def dense(query: mx.array, key: mx.array, value: mx.array, **options) -> tuple[mx.array, mx.array]:
    """Attention computed densely in the dtype of the query: what a kernel in that dtype is measured by."""
    B, H, L, _ = query.shape
    S, dtype = key.shape[2], query.dtype
    key, value = (mx.repeat(x, H // x.shape[1], axis=1) for x in (key, value))
    score = options["scale"] * (query @ key.swapaxes(-1, -2))
    if options["softcap"]:
        score = options["softcap"] * mx.tanh(score / options["softcap"])
    mask = options["mask"]
    if (slopes := options.get("alibi_slopes")) is not None:
        distance = mx.abs(mask.query_positions(L, S)[:, None, :, None] - mx.arange(S))
        score = score - slopes.astype(dtype)[:, None, None] * distance.astype(dtype)
    if (table := options.get("relative_bias")) is not None:
        score = score + table.astype(dtype)[:, mx.arange(S) - mx.arange(L)[:, None] + L - 1]
    if (bias := options.get("bias")) is not None:
        score = score + bias.astype(dtype)
    visible = mask.dense(B, L, S)
    visible = mx.ones((1, 1, L, S), dtype=mx.bool_) if visible is None else visible
    score = mx.where(visible, score, mx.array(-6e4, dtype=dtype))
    empty = ~visible.any(axis=-1, keepdims=True)
    columns = score
    if (sinks := options.get("sinks")) is not None:
        sink = mx.broadcast_to(sinks.astype(dtype)[:, None, None], (B, H, L, 1))
        columns = mx.concatenate([score, sink], axis=-1)
    weight = mx.where(empty, mx.array(0, dtype=dtype), mx.softmax(columns, axis=-1)[..., :S])
    lse = mx.where(empty, mx.inf, mx.logsumexp(columns.astype(mx.float32), axis=-1, keepdims=True))
    if options["dropout"]:
        from mlxlm.kernels.attention.dropout import keep_mask

        kept = keep_mask(options["dropout_key"], options["dropout"], B, H, (0, L), (0, S))
        weight = mx.where(kept, weight / (1 - options["dropout"]), mx.array(0, dtype=dtype))
    return weight @ value, mx.broadcast_to(lse[..., 0], (B, H, L))


def limits(case: cases.Case) -> dict[str, float]:
    """The error allowed for each result, 1e-5 where none is named: in 16 bits twice that of a dense computation,
    or one and a half units of the largest number where that happens to cancel exactly.

    The gradient of a slope is a sum of large distances times small numbers that cancel.
    """
    if case.dtype == "float32":
        return {"alibi_slopes": 1e-4}
    data = cases.make(case)
    found = cases.errors(cases.results(dense, data), data.exact)
    return {name: max(2 * error, 1.5 * _EPSILON[case.dtype]) for name, error in found.items() if name != "lse"}


def check(case: cases.Case) -> None:
    errors, _ = cases.emulated_results(case)
    allowed = limits(case)
    wrong = {name: error for name, error in errors.items() if not error <= allowed.get(name, 1e-5)}
    assert not wrong, f"allowed: {allowed or 1e-5}"


@pytest.mark.parametrize("case", cases.ALONE, ids=str)
def test_each_part_of_the_contract_alone_matches_float64(case):
    check(case)


@pytest.mark.parametrize("case", cases.PAIRS, ids=str)
def test_every_two_parts_together_match_float64(case):
    check(case)


@pytest.mark.parametrize("case", cases.DECODE, ids=str)
def test_few_queries_against_many_keys_match_float64(case):
    check(case)


@pytest.mark.parametrize("case", _WIDTHS, ids=str)
def test_head_widths_match_float64(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in cases.WIDTHS if case not in _WIDTHS], ids=str)
def test_every_row_of_the_tile_table_matches_float64(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.MANY_PAIRS, ids=str)
def test_every_two_of_all_choices_match_float64(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["plain", "causal", "window", "segments", "everything"])
def test_longer_sequences_match_float64(mask, dtype):
    check(cases.Case(mask=mask, dtype=dtype, batch=1, queries=515, keys=515, head_dim=64, value_dim=64))


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_same_call_gives_the_same_bits_in_any_order_of_threads(kind):
    case = cases.Case(
        mask="everything", alibi=True, relative_bias=True, bias="B11S", sinks=True, dropout=True,
        queries=3 if kind == "decode" else 45,
    )  # fmt: skip
    data, found = cases.make(case), []
    for seed in (0, 1, 2):
        with cases.emulated_attention(seed=seed):
            found.append(cases.results(metal.attention, data))
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize(("dtype", "queries"), [("float32", 45), ("float16", 45), ("bfloat16", 45), ("bfloat16", 5)])
def test_a_query_that_sees_no_key_gives_zero_and_so_do_its_gradients(dtype, queries):
    """In decoding too, which is what five queries take."""
    case = cases.Case(mask="nothing visible", sinks=True, alibi=True, bias="BHLS", dtype=dtype, queries=queries)
    data = cases.make(case)
    with cases.emulated_attention():
        found = cases.results(metal.attention, data)
    empty = np.isinf(data.exact["lse"])
    assert empty.any()
    assert not empty.all()
    assert (found["lse"][empty] == np.inf).all()
    assert (found["out"][empty] == 0).all()
    assert (found["query"][empty] == 0).all()
    assert (found["bias"][empty] == 0).all()
    assert all(np.isfinite(value).all() for name, value in found.items() if name != "lse")


def test_a_row_hidden_by_an_infinite_bias_gives_zero_and_no_nan():
    data = cases.make(cases.Case(batch=1, heads=2, kv_heads=2, bias="BHLS"))
    bias = np.array(data.inputs["bias"])
    bias[:, :, 7] = -np.inf
    bias[:, :, 8, 1:] = -np.inf
    data.inputs["bias"] = mx.array(bias)
    with cases.emulated_attention():
        found = cases.results(metal.attention, data)
    assert (found["out"][:, :, 7] == 0).all()
    np.testing.assert_allclose(found["out"][:, :, 8], np.array(data.inputs["value"])[:, :, 0], rtol=1e-5)
    assert all(np.isfinite(value).all() for name, value in found.items() if name != "lse")


def test_an_integer_offset_and_an_array_of_it_give_the_same():
    data = cases.make(cases.Case(mask="causal", alibi=True))
    with cases.emulated_attention():
        expected = cases.results(metal.attention, data)
        data.mask["query_offset"] = np.array([25, 25], dtype=np.int32)
        found = cases.results(metal.attention, data)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("mode", ["grad", "checkpoint"])
def test_it_is_a_function_that_mlx_can_transform(mode):
    case = cases.Case(mask="segments", batch=1, layout="BLHD")
    data = cases.make(case)
    arguments = {**data.arguments(), "return_lse": False}

    def loss(query, key, value):
        out = metal.attention(query * 2, key, value, **arguments)
        return (out * data.out_gradient).sum()

    arrays = [data.inputs[name] for name in ("query", "key", "value")]
    function = mx.checkpoint(loss) if mode == "checkpoint" else loss
    with cases.emulated_attention():
        found = mx.grad(function, argnums=(0, 1, 2))(*arrays)
    data.inputs["query"] = data.inputs["query"] * 2
    data.lse_gradient[...] = 0
    exact = cases.exact(data)
    for array, name, factor in zip(found, ("query", "key", "value"), (2, 1, 1), strict=True):
        np.testing.assert_allclose(np.array(array), factor * exact[name], atol=1e-5 * np.abs(exact[name]).max())
