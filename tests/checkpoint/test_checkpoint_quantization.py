"""Quantization configs in all their forms, and the values of quantized weights."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.checkpoint import (
    Quantization,
    QuantizationConfig,
    dequantize,
    open_safetensors,
    quantization,
    quantized_modules,
    save_safetensors,
)
from mlxlm.errors import CheckpointError, ConfigError, UnsupportedModelError

FOUR = {"group_size": 64, "bits": 4, "mode": "affine"}


# ---------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    "config",
    [
        {"quantization": FOUR},
        {"quantization_config": FOUR},
        {"quantization": FOUR, "quantization_config": FOUR},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"quantization": {}},
        {"quantization": FOUR, "quantization_config": {"quant_method": "fp8"}},
    ],
    ids=["own key", "copy alone", "both", "without mode", "defaults", "what the original had been"],
)
def test_mlxs_forms_are_read(config):
    parsed = QuantizationConfig.parse({"model_type": "x", **config})
    assert parsed == QuantizationConfig(Quantization(4, 64, "affine"))
    assert parsed.to_json() == FOUR


@pytest.mark.parametrize("config", [{}, {"quantization": None}, {"quantization_config": None}])
def test_a_model_that_is_not_quantized_has_none(config):
    assert QuantizationConfig.parse(config) is None


def test_overrides_by_module_path():
    entry = {**FOUR, "lm_head": False, "a.b": {"bits": 8, "group_size": 32}, "c": {"bits": 6}, "d": True}
    entry["e"] = {"mode": "mxfp4"}
    config = QuantizationConfig.parse({"quantization": entry})
    assert config.for_module("model.layers.0.mlp") == Quantization(4, 64)
    assert config.for_module("lm_head") is None
    assert config.for_module("a.b") == Quantization(8, 32)
    assert config.for_module("c") == Quantization(6, 64)
    assert config.for_module("d") == Quantization(4, 64)
    assert config.for_module("e") == Quantization(4, 32, "mxfp4")
    assert QuantizationConfig.parse({"quantization": config.to_json()}) == config


def test_an_override_does_not_inherit_from_the_default():
    """mlx-lm hands an override to the module as it stands; what it lacks is MLX's default, not the model's."""
    config = QuantizationConfig.parse({"quantization": {"group_size": 32, "bits": 8, "x": {"bits": 4}}})
    assert config.for_module("x") == Quantization(4, 64)


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "eetq"])
def test_another_toolkits_method_is_named_with_the_way_out(method):
    with pytest.raises(UnsupportedModelError, match=f"'{method}'.*use the original float16 or bfloat16"):
        QuantizationConfig.parse({"quantization_config": {"quant_method": method, "bits": 4}})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"bits": 7}, r"bits is 7; valid in affine mode: 1, 2, 3, 4, 5, 6, 8"),
        ({"bits": True}, "bits is True"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": [4]}, r"bits is \[4\]"),
        ({"group_size": 16}, "group_size is 16; valid in affine mode: 32, 64, 128"),
        ({"mode": "mxfp4", "group_size": 64}, "group_size is 64; valid in mxfp4 mode: 32"),
        ({"mode": "afine"}, "unknown quantization mode 'afine'; did you mean 'affine'"),
        ({"mode": ["affine"]}, "unknown quantization mode"),
        ({"desc_act": 3}, "unknown entry 'desc_act': 3"),
        ({"group_sise": 64}, "unknown entry 'group_sise': 64"),
        ({"lm_head": {"bit": 4}}, r"unknown key 'bit' in 'quantization\.lm_head'.*'bits'"),
    ],
)
def test_bad_entries_are_refused(entry, message):
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig.parse({"quantization": entry})


def test_entries_that_are_not_objects_or_contradict_are_refused():
    with pytest.raises(ConfigError, match="must be an object, not 4"):
        QuantizationConfig.parse({"quantization": 4})
    with pytest.raises(ConfigError, match="contradict each other"):
        QuantizationConfig.parse({"quantization": FOUR, "quantization_config": {**FOUR, "bits": 8}})


# ---------------------------------------------------------------------------------------------------- values


def unpack(weight: mx.array, bits: int) -> np.ndarray:
    """The integers of a packed weight, bit by bit: consecutive values from the low bits of consecutive words up."""
    words = np.array(weight)
    stream = np.unpackbits(words.view(np.uint8).reshape(*words.shape[:-1], -1), axis=-1, bitorder="little")
    return (stream.reshape(*words.shape[:-1], -1, bits) << np.arange(bits)).sum(axis=-1)


@pytest.mark.parametrize("scales_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_weights_have_the_values_of_the_formula(bits, group_size, scales_dtype):
    mx.random.seed(bits)
    matrix = mx.random.normal((5, 384)).astype(getattr(mx, scales_dtype))
    weight, scales, biases = mx.quantize(matrix, group_size=group_size, bits=bits)
    values = dequantize(weight, scales, biases, Quantization(bits, group_size), mx.float32)
    scale, bias = (
        np.array(part.astype(mx.float32), np.float64).repeat(group_size, axis=-1) for part in (scales, biases)
    )
    expected = unpack(weight, bits) * scale + bias
    assert values.dtype == mx.float32
    assert np.abs(np.array(values) - expected).max() < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(64,), (3, 0, 64), (2, 3, 128), (9000, 64)], ids=str)
def test_the_numpy_path_and_mlx_agree_on_every_shape(bits, shape, monkeypatch):
    rng = np.random.default_rng(bits)
    weight = mx.array(rng.integers(0, 2**32, (*shape[:-1], shape[-1] * bits // 32), dtype=np.uint32))
    scales, biases = (mx.array(rng.normal(size=(*shape[:-1], shape[-1] // 64)).astype(np.float32)) for _ in range(2))
    monkeypatch.setattr(quantization, "backend", lambda: "cpu")
    values = dequantize(weight, scales, biases, Quantization(bits, 64), mx.float32)
    monkeypatch.setattr(quantization, "backend", lambda: "metal")
    expected = dequantize(weight, scales, biases, Quantization(bits, 64), mx.float32)
    assert values.shape == expected.shape == shape
    assert np.allclose(np.array(values), np.array(expected), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "metal"])
def test_parts_that_are_views_are_read_right(backend, monkeypatch):
    monkeypatch.setattr(quantization, "backend", lambda: backend)
    matrix = mx.random.normal((8, 64))
    weight, scales, biases = mx.quantize(matrix, group_size=32, bits=4)
    form = Quantization(4, 32)
    whole = dequantize(weight, scales, biases, form, mx.float32)
    part = dequantize(weight[::2], scales[::2], biases[::2], form, mx.float32)
    assert mx.array_equal(part, whole[::2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_are_the_float32_values_rounded_once(dtype):
    weight, scales, biases = mx.quantize(mx.random.normal((4, 64)).astype(mx.float16), group_size=64, bits=8)
    exact = dequantize(weight, scales, biases, Quantization(8, 64), mx.float32)
    values = dequantize(weight, scales, biases, Quantization(8, 64), getattr(mx, dtype))
    assert values.dtype == getattr(mx, dtype)
    assert mx.array_equal(values, exact.astype(values.dtype))


# The magnitudes of a 4-bit float with 2 exponent bits and 1 mantissa bit (OCP Microscaling formats, 2023).
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_mxfp4_values():
    mx.random.seed(0)
    weight, scales = mx.quantize(mx.random.normal((4, 64)), mode="mxfp4")
    codes = unpack(weight, 4)
    expected = np.where(codes & 8, -1, 1) * FP4[codes & 7] * np.exp2(np.array(scales).repeat(32, axis=-1) - 127.0)
    for dtype in (mx.float32, mx.bfloat16):
        values = dequantize(weight, scales, None, Quantization(4, 32, "mxfp4"), dtype)
        assert values.dtype == dtype
        assert np.array_equal(np.array(values.astype(mx.float32)), expected)


@pytest.mark.parametrize(("mode", "bits", "group_size", "worst"), [("mxfp8", 8, 32, 0.07), ("nvfp4", 4, 16, 0.5)])
def test_other_float_modes_are_near_what_was_quantized(mode, bits, group_size, worst):
    mx.random.seed(1)
    matrix = mx.random.uniform(1, 2, (4, 64))
    weight, scales = mx.quantize(matrix, mode=mode)
    values = dequantize(weight, scales, None, Quantization(bits, group_size, mode), mx.float32)
    assert 0 < float(mx.abs(values - matrix).max()) < worst


def test_parts_that_do_not_belong_together_are_refused():
    weight, scales, biases = mx.quantize(mx.random.normal((4, 128)), group_size=64, bits=4)
    with pytest.raises(CheckpointError, match=r"weight \(4, 16\), scales \(4, 2\).* aren't a weight of 8 bits"):
        dequantize(weight, scales, biases, Quantization(8, 64), mx.float32)
    with pytest.raises(CheckpointError, match="groups of 32"):
        dequantize(weight, scales, biases, Quantization(4, 32), mx.float32)
    with pytest.raises(CheckpointError, match="biases none"):
        dequantize(weight, scales, None, Quantization(4, 64), mx.float32)
    with pytest.raises(CheckpointError, match="aren't a weight"):
        dequantize(weight[:2], scales, biases, Quantization(4, 64), mx.float32)


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def quantized(tmp_path):
    """A checkpoint with two quantized modules (4 and 8 bits) and a plain one."""
    arrays = {"norm.weight": mx.ones(8)}
    for path, bits in (("up", 4), ("head", 8)):
        names = (f"{path}.weight", f"{path}.scales", f"{path}.biases")
        arrays |= dict(zip(names, mx.quantize(mx.random.normal((4, 64)), group_size=64, bits=bits), strict=True))

    def build(**changes: mx.array | None):
        kept = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
        save_safetensors(tmp_path, kept)
        return open_safetensors(tmp_path)

    return build


CONFIG = QuantizationConfig(Quantization(4, 64), {"head": Quantization(8, 64)})


def test_the_quantized_modules_of_a_checkpoint(quantized):
    assert quantized_modules(quantized(), CONFIG) == {"up": Quantization(4, 64), "head": Quantization(8, 64)}


def test_all_contradictions_between_config_and_checkpoint_are_listed(quantized):
    with pytest.raises(
        CheckpointError,
        match=r"up is quantized but .* says not, head is quantized|head is quantized but .* says not, up is",
    ):
        quantized_modules(quantized(), None)
    with pytest.raises(
        CheckpointError, match=r"head \(uint32 \(4, 16\), scales \(4, 1\)\) isn't 4 bits in groups of 64"
    ):
        quantized_modules(quantized(), QuantizationConfig(Quantization(4, 64)))
    with pytest.raises(CheckpointError, match="up lacks biases"):
        quantized_modules(quantized(**{"up.biases": None}), CONFIG)
    with pytest.raises(CheckpointError, match="up has scales but no weight"):
        quantized_modules(quantized(**{"up.weight": None}), CONFIG)


def test_a_plain_checkpoint_has_no_quantized_modules(tmp_path):
    save_safetensors(tmp_path, {"a.weight": mx.ones(3)})
    assert quantized_modules(open_safetensors(tmp_path), None) == {}
