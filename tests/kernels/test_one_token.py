"""The kernels for one token on the emulator, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulation import compiler, needs_compiler

from mlxlm.kernels import one_token
from mlxlm.kernels.one_token import Heads, Norm, Weight, attend, product, projected_heads
from mlxlm.kernels.one_token.source import kernel
from tools.metal_emulator import emulated_metal

pytestmark = needs_compiler
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
TOLERANCE = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def name(value: Any) -> str:
    return str(value).removeprefix("mlx.core.") if isinstance(value, mx.Dtype) else str(value)


@pytest.fixture(autouse=True)
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    kernel.cache_clear()
    with emulated_metal() as device:
        yield device
    kernel.cache_clear()


def normal(rng: np.random.Generator, dtype: mx.Dtype, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def exact(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def error(found: mx.array, right: np.ndarray) -> float:
    return float(np.abs(exact(found) - right).max() / np.abs(right).max())


def weight_of(
    rng: np.random.Generator, dtype: mx.Dtype, rows: int, inputs: int, bits: int, bias: bool, group: int = 32
) -> tuple[Weight, Any]:
    """A weight and its numbers in float64."""
    own = normal(rng, dtype, rows, inputs) * inputs**-0.5
    shift = normal(rng, dtype, rows) if bias else None
    if not bits:
        return Weight(weight=own.astype(dtype), bias=shift), exact(own.astype(dtype))
    packed, scales, biases = mx.quantize(own, group_size=group, bits=bits)
    numbers = mx.dequantize(*(a.astype(mx.float32) if a is not packed else a for a in (packed, scales, biases)),
                            group_size=group, bits=bits)  # fmt: skip
    return Weight(weight=packed, scales=scales, biases=biases, bias=shift, bits=bits, group_size=group), exact(numbers)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_product_with_all_that_goes_around_it(dtype: mx.Dtype, bits: int) -> None:
    rng = np.random.default_rng(bits)
    x, added = normal(rng, dtype, 160), normal(rng, dtype, 47)
    weight, numbers = weight_of(rng, dtype, 47, 160, bits, bias=True)
    scale = mx.array(rng.standard_normal(160).astype(np.float32))
    found = product(x, weight, norm=Norm(scale=scale, eps=1e-3), activation="silu", added=added)
    normed = exact(x) / np.sqrt((exact(x) ** 2).mean() + 1e-3) * exact(scale)
    inner = numbers @ normed + exact(weight.bias)
    assert error(found, inner / (1 + np.exp(-inner)) + exact(added)) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [64, 128])
def test_groups_of_any_size_and_heads_of_quantized_weights(group: int, bits: int) -> None:
    rng = np.random.default_rng(group + bits)
    weight, numbers = weight_of(rng, mx.float32, 6 * 8, 640, bits, bias=True, group=group)
    x = normal(rng, mx.float32, 640)
    form = Heads(num_heads=4, num_kv_heads=1, head_dim=8)
    found = projected_heads(x, weight, form, mx.array([0], dtype=mx.int32), norm=Norm(scale=mx.ones(640), eps=1e-5))
    normed = exact(x) / np.sqrt((exact(x) ** 2).mean() + 1e-5)
    assert error(mx.concatenate(found), numbers @ normed + exact(weight.bias)) < 1e-5


@pytest.mark.parametrize("bits", [0, 4])
def test_vectors_and_weights_may_be_parts_of_others(bits: int) -> None:
    rng = np.random.default_rng(8)
    whole, numbers = weight_of(rng, mx.float32, 40, 96, bits, bias=True)
    parts = {name: array[3:24] for name, array in whole.parts().items()}
    rows = normal(rng, mx.float32, 2, 96)
    x, added = rows[1], rows[0, 1:22]
    mx.eval(parts, x, added)
    found = product(x, Weight(**parts, bits=whole.bits, group_size=whole.group_size), added=added)
    assert error(found, numbers[3:24] @ exact(x) + exact(whole.bias[3:24]) + exact(added)) < 1e-5


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("normed", [False, True], ids=("plain", "normed"))
def test_a_vector_that_is_too_long_for_threadgroup_memory(bits: int, normed: bool) -> None:
    rng = np.random.default_rng(6)
    x = normal(rng, mx.float32, 8224)
    weight, numbers = weight_of(rng, mx.float32, 4, 8224, bits, bias=False)
    norm = Norm(scale=mx.full((8224,), 2.0), eps=1e-5) if normed else None
    scale = 2 / np.sqrt((exact(x) ** 2).mean() + 1e-5) if normed else 1.0
    assert error(product(x, weight, norm=norm), numbers @ exact(x) * scale) < 1e-5


@pytest.mark.parametrize("bits", [0, 4])
def test_a_gate_and_what_it_lets_through(bits: int) -> None:
    rng = np.random.default_rng(1)
    weight, numbers = weight_of(rng, mx.float32, 60, 64, bits, bias=False)
    x = normal(rng, mx.float32, 64)
    found = product(x, weight, activation="gelu_tanh", gated=True)
    gate, up = numbers[:30] @ exact(x), numbers[30:] @ exact(x)
    curve = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    assert found.shape == (30,)
    assert error(found, curve * up) < 1e-5


@pytest.mark.parametrize("activation", one_token.ACTIVATIONS)
def test_activations_are_those_of_the_layers(activation: str) -> None:
    from mlxlm.layers.activations import activation as plain

    rng = np.random.default_rng(2)
    weight, numbers = weight_of(rng, mx.float32, 64, 32, 0, bias=False)
    x = 4 * normal(rng, mx.float32, 32)
    right = plain(activation)(mx.array((numbers @ exact(x)).astype(np.float32)))
    assert error(product(x, weight, activation=activation), exact(right)) < 1e-5


@pytest.mark.parametrize("rounded", [True, False], ids=("rounded", "one rounding"))
def test_the_norm_rounds_where_the_layer_does(rounded: bool) -> None:
    rng = np.random.default_rng(3)
    x, scale = normal(rng, mx.bfloat16, 256), normal(rng, mx.bfloat16, 256).astype(mx.float32)
    eye = Weight(weight=mx.eye(256).astype(mx.bfloat16))
    found = product(x, eye, norm=Norm(scale=scale, eps=1e-5, rounded=rounded))
    if rounded:
        right = mx.fast.rms_norm(x, scale.astype(mx.bfloat16), 1e-5)
    else:
        right = mx.fast.rms_norm(x.astype(mx.float32), scale, 1e-5).astype(mx.bfloat16)
    assert (found == right).mean().item() > 0.99  # a sum in another order may move one to the next number


@pytest.mark.parametrize("interleaved", [False, True], ids=("half", "interleaved"))
@pytest.mark.parametrize("rotated", [0, 32, 64])
def test_heads_turned_by_their_position(rotated: int, interleaved: bool) -> None:
    rng = np.random.default_rng(rotated)
    heads, kv_heads, dim, place = 6, 2, 64, 1234
    weight, numbers = weight_of(rng, mx.float32, (heads + 2 * kv_heads) * dim, 96, 0, bias=True)
    x = normal(rng, mx.float32, 96)
    inverse = mx.array(10000.0 ** (-np.arange(0, rotated, 2) / max(rotated, 1)).astype(np.float32)) if rotated else None
    form = Heads(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, inverse=inverse, interleaved=interleaved)
    found = projected_heads(x, weight, form, mx.array([place], dtype=mx.int32))
    plain = (numbers @ exact(x) + exact(weight.bias)).reshape(-1, dim)
    if rotated:
        angle = place * exact(inverse)
        first, second = (slice(0, rotated, 2), slice(1, rotated, 2)) if interleaved else (
            slice(0, rotated // 2), slice(rotated // 2, rotated))  # fmt: skip
        turned = plain[: heads + kv_heads]
        a, b = turned[:, first].copy(), turned[:, second].copy()
        turned[:, first] = a * np.cos(angle) - b * np.sin(angle)
        turned[:, second] = b * np.cos(angle) + a * np.sin(angle)
    for part, right in zip(found, np.split(plain.reshape(-1), [heads * dim, (heads + kv_heads) * dim]), strict=True):
        assert error(part, right) < 1e-4  # the angle itself is a float32 product


@pytest.mark.parametrize("rounded", [True, False], ids=("rounded", "one rounding"))
def test_heads_normed_before_they_are_turned(rounded: bool) -> None:
    rng = np.random.default_rng(7)
    weight, numbers = weight_of(rng, mx.float32, 8 * 24, 64, 0, bias=False)
    x = normal(rng, mx.float32, 64)
    scales = [mx.array(rng.standard_normal(24).astype(np.float32)) for _ in range(2)]
    norms = tuple(Norm(scale=scale, eps=1e-2, rounded=rounded) for scale in scales)
    form = Heads(num_heads=4, num_kv_heads=2, head_dim=24, inverse=mx.array([0.5, 0.25, 0.125]))
    found = projected_heads(x, weight, form, mx.array([3], dtype=mx.int32), head_norms=norms)
    heads = (numbers @ exact(x)).reshape(8, 24)
    heads[:6] /= np.sqrt((heads[:6] ** 2).mean(1, keepdims=True) + 1e-2)
    heads[:4], heads[4:6] = heads[:4] * exact(scales[0]), heads[4:6] * exact(scales[1])
    a, b, angle = heads[:6, :3].copy(), heads[:6, 3:6].copy(), 3 * np.array([0.5, 0.25, 0.125])
    heads[:6, :3], heads[:6, 3:6] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    for part, right in zip(found, np.split(heads.reshape(-1), [4 * 24, 6 * 24]), strict=True):
        assert error(part, right) < 1e-5


ATTENTION = {
    "64 wide": {},
    "float16": {"dtype": mx.float16},
    "bfloat16, 128 wide": {"dtype": mx.bfloat16, "dim": 128},
    "80 wide": {"dim": 80, "dtype": mx.float16},
    "256 wide": {"dim": 256, "heads": 2, "kv_heads": 1},
    "the first token": {"place": 0},
    "window": {"window": 7},
    "softcap": {"softcap": 3.0},
    "no shared heads": {"heads": 3, "kv_heads": 3},
    "split keys": {"slots": 2304, "place": 1500},
    "split keys, window": {"slots": 2304, "place": 2303, "window": 600},
    "a window that is not full": {"place": 3, "window": 7},
    "the first token, split keys": {"slots": 2304, "place": 0, "window": 5},
    "a hundred thousand slots": {"slots": 100_096, "place": 70_001, "dim": 16, "heads": 2, "kv_heads": 1},
    "more splits than keys": {"slots": 2304, "place": 2},
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_over_a_part_of_the_cache(case: str) -> None:
    given: dict[str, Any] = {"dtype": mx.float32, "dim": 64, "heads": 4, "kv_heads": 2, "slots": 256, "place": 77,
                             "window": None, "softcap": None, **ATTENTION[case]}  # fmt: skip
    rng = np.random.default_rng(4)
    dtype, dim, heads, kv_heads, place = (given[key] for key in ("dtype", "dim", "heads", "kv_heads", "place"))
    query = normal(rng, dtype, heads * dim)
    keys, values = (normal(rng, dtype, 1, kv_heads, given["slots"], dim) for _ in range(2))
    keys[:, :, place + 1 :], values[:, :, place + 1 :] = mx.nan, mx.nan  # room that nothing may come from
    found = attend(query, keys, values, mx.array([place], dtype=mx.int32), scale=0.3, softcap=given["softcap"],
                   window=given["window"])  # fmt: skip
    seen = slice(max(0, place + 1 - (given["window"] or place + 1)), place + 1)
    k, v = (np.repeat(exact(a)[0, :, seen], heads // kv_heads, axis=0) for a in (keys, values))
    scores = 0.3 * np.einsum("hd,hsd->hs", exact(query).reshape(heads, dim), k)
    if given["softcap"]:
        scores = given["softcap"] * np.tanh(scores / given["softcap"])
    weights = np.exp(scores - scores.max(1, keepdims=True))
    right = np.einsum("hs,hsd->hd", weights / weights.sum(1, keepdims=True), v)
    assert error(found, right.reshape(-1)) < TOLERANCE[dtype]


def test_the_text_holds_to_metals_address_spaces(metal: Any) -> None:
    if compiler.clang() is None:
        pytest.skip("needs clang")
    metal.collecting = True
    rng = np.random.default_rng(5)
    weight, _ = weight_of(rng, mx.bfloat16, 192, 64, 4, bias=True)
    norm, x = Norm(scale=mx.ones((64,)), eps=1e-5), normal(rng, mx.bfloat16, 64)
    position = mx.array([3], dtype=mx.int32)
    product(x, weight, norm=norm, activation="silu", gated=True)
    projected_heads(x, weight, Heads(num_heads=1, num_kv_heads=1, head_dim=64, inverse=mx.ones((32,))), position)
    projected_heads(x, weight, Heads(num_heads=1, num_kv_heads=1, head_dim=64), position, head_norms=(norm, norm))
    keys = mx.zeros((1, 1, 4096, 64), dtype=mx.bfloat16)
    attend(x, keys, keys, position, scale=1.0, softcap=2.0)
    assert len(metal.kernels) == 6
    for text in metal.kernels.values():
        assert compiler.check_address_spaces(text) == ""


def test_the_check_of_doctor_finds_all_right_here_and_a_wrong_kernel(
    metal: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from mlxlm import runtime
    from mlxlm.kernels.attention import tuning
    from mlxlm.kernels.one_token import selfcheck

    assert list(selfcheck.run()) == []  # the CPU has no such kernels
    monkeypatch.setenv("MLXLM_CACHE", str(tmp_path))
    monkeypatch.setattr(runtime, "backend", lambda: "metal")
    monkeypatch.setattr(selfcheck, "LIMITS", {"float32": 1e-4})
    tuning.record.cache_clear()
    checks = list(selfcheck.run())
    assert [check.problem for check in checks] == [""] * 8
    assert selfcheck.record_failures(checks) == selfcheck.disabled() == ""
    monkeypatch.setattr(selfcheck, "attend", lambda query, *_, **__: query)
    wrong = list(selfcheck.run())
    assert [check.case for check in wrong if check.problem] == [
        "attention, float32", "attention, window, float32", "attention, split, float32"
    ]  # fmt: skip
    assert "relative error" in selfcheck.record_failures(wrong)
    assert selfcheck.disabled().startswith("attention, float32: relative error")
    assert selfcheck.record_failures(checks) == selfcheck.disabled() == ""
    tuning.record.cache_clear()
