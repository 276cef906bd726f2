"""Weights packed by other toolkits: against their formulas, one value at a time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.checkpoint import dequantize, open_checkpoint, quantized_modules, unpacked
from mlxlm.errors import CheckpointError, ConfigError, UnsupportedModelError


def words(integers: list[int], bits: int) -> list[int]:
    """Integers from the low bits up, as 32-bit words with a sign."""
    stream = sum(int(value) << bits * place for place, value in enumerate(integers))
    count = len(integers) * bits // 32
    return [int(np.uint32(stream >> 32 * place & 0xFFFFFFFF).view(np.int32)) for place in range(count)]


class Made:
    """A module of random integers, zeros and scales, and the weight that they stand for."""

    def __init__(self, bits: int, size: int, *, inputs: int = 64, outputs: int = 32, symmetric: bool, seed: int = 1):
        rng = np.random.default_rng(seed)
        groups = inputs // size
        self.q = rng.integers(0, 2**bits, (inputs, outputs))
        middle = np.full((groups, outputs), 2 ** (bits - 1))
        self.zeros = middle if symmetric else rng.integers(1, 2**bits, (groups, outputs))
        self.scales = rng.normal(size=(groups, outputs)).astype(np.float16)
        self.bits, self.order = bits, np.arange(inputs) // size

    @property
    def weight(self) -> np.ndarray:
        values = (self.q - self.zeros[self.order]) * self.scales.astype(np.float64)[self.order]
        return values.T.astype(np.float32)

    def gptq(self, *, stored_offset: int = 1) -> dict[str, np.ndarray]:
        mask = 2**self.bits - 1
        columns = [words(list(column), self.bits) for column in self.q.T]
        rows = [words([(z - stored_offset) & mask for z in row], self.bits) for row in self.zeros]
        return {
            "m.qweight": np.array(columns, np.int32).T,
            "m.qzeros": np.array(rows, np.int32),
            "m.scales": self.scales,
            "m.g_idx": self.order.astype(np.int32),
        }

    def awq(self) -> dict[str, np.ndarray]:
        def rows(matrix):
            parts = matrix.reshape(len(matrix), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(matrix), -1)
            return np.array([words(list(row), 4) for row in parts], np.int32)

        return {"m.qweight": rows(self.q), "m.qzeros": rows(self.zeros), "m.scales": self.scales}


@pytest.fixture
def view(tmp_path):
    def view(arrays: dict[str, np.ndarray], settings: dict):
        content = {name: mx.array(np.ascontiguousarray(array)) for name, array in arrays.items()}
        mx.save_safetensors(str(tmp_path / "model.safetensors"), {**content, "m.bias": mx.ones(3)})
        return unpacked(open_checkpoint(tmp_path), {"quantization_config": settings})

    return view


def values(checkpoint, name: str = "m") -> np.ndarray:
    forms, arrays = quantized_modules(checkpoint, None), checkpoint.load([f"{name}.weight"])
    if name not in forms:
        return np.array(arrays[f"{name}.weight"].astype(mx.float32))
    parts = (arrays[f"{name}.{kind}"] for kind in ("weight", "scales", "biases"))
    return np.array(dequantize(*parts, forms[name], mx.float32))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_becomes_mlxs_form_exactly(view, bits, symmetric, layout):
    made = Made(bits, 32, symmetric=symmetric)
    arrays = made.gptq(stored_offset=1 if layout == "gptq" else 0)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": layout}
    checkpoint = view(arrays, settings)
    assert set(checkpoint.tensors) == {"m.weight", "m.bias"}
    info = checkpoint.tensors["m.weight"]
    assert (info.shape, info.quantization.bits, info.quantization.group_size) == ((32, 64), bits, 32)
    assert np.array_equal(values(checkpoint), made.weight)
    scales = checkpoint.load(["m.weight"])["m.scales"]
    assert scales.dtype == (mx.float16 if symmetric else mx.float32)


@pytest.mark.parametrize("seed", [1, 2])
def test_gptq_in_the_order_of_activations_becomes_floats(view, seed):
    made = Made(4, 16, symmetric=False, seed=seed)
    made.order = np.random.default_rng(seed).permutation(made.order)
    checkpoint = view(made.gptq(), {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True})
    assert checkpoint.tensors["m.weight"].quantization is None
    assert np.array_equal(values(checkpoint), made.weight)


@pytest.mark.parametrize(("size", "given"), [(64, -1), (64, 64), (16, 16)], ids=["one", "64", "too small for MLX"])
def test_groups_of_other_sizes(view, size, given):
    made = Made(4, size, symmetric=True)
    checkpoint = view(made.gptq(), {"quant_method": "gptq", "bits": 4, "group_size": given})
    assert (checkpoint.tensors["m.weight"].quantization is None) == (size == 16)
    assert np.array_equal(values(checkpoint), made.weight)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
def test_awq_becomes_mlxs_form_exactly(view, symmetric):
    made = Made(4, 32, symmetric=symmetric)
    checkpoint = view(made.awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})
    assert np.array_equal(values(checkpoint), made.weight)


@pytest.mark.parametrize(
    ("scale_shape", "block", "name"),
    [
        ((), None, "weight_scale"),
        ((6, 1), None, "weight_scale"),
        ((6,), None, "weight_scale_inv"),
        ((2, 3), [4, 4], "weight_scale_inv"),
        ((3, 5), None, "weight_scale_inv"),
    ],
    ids=["tensor", "rows", "rows flat", "blocks", "blocks without a size"],
)
def test_floats_of_8_bits_are_scaled_in_float32(tmp_path, scale_shape, block, name):
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 0x7E, (6, 10), dtype=np.uint8) | (rng.integers(0, 2, (6, 10)) << 7).astype(np.uint8)
    scale = rng.uniform(0.5, 2, scale_shape).astype(np.float32)
    path = tmp_path / "model.safetensors"
    arrays = {"m.weight": mx.array(codes), f"m.{name}": mx.array(scale), "m.input_scale": mx.ones(1)}
    mx.save_safetensors(str(path), arrays)
    path.write_bytes(relabelled(path))
    settings = {"quant_method": "fp8", "weight_block_size": block}
    checkpoint = unpacked(open_checkpoint(tmp_path), {"quantization_config": settings})
    assert list(checkpoint.tensors) == ["m.weight"]
    plain = np.array(mx.from_fp8(mx.array(codes), mx.float32))
    matrix = scale.reshape(scale.shape if scale.ndim == 2 else (-1, 1))
    rows, columns = block or (6 // matrix.shape[0], 10 // matrix.shape[1])
    expected = [[plain[i, j] * matrix[i // rows, j // columns] for j in range(10)] for i in range(6)]
    assert np.array_equal(np.array(checkpoint.load()["m.weight"]), np.array(expected, np.float32))


def relabelled(path) -> bytes:
    """The file with its bytes called floats of 8 bits, which MLX can't write."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def test_what_is_no_such_weight_is_refused_with_its_reason(view):
    good, settings = Made(4, 32, symmetric=True).gptq(), {"quant_method": "gptq", "bits": 4, "group_size": 32}
    without = {name: array for name, array in good.items() if name != "m.qzeros"}
    with pytest.raises(CheckpointError, match=r"m lacks m\.qzeros"):
        view(without, settings)
    with pytest.raises(CheckpointError, match="aren't 4 bits in groups of 64"):
        view(good, {**settings, "group_size": 64})
    with pytest.raises(CheckpointError, match="doesn't give 64 inputs one of 2 groups"):
        view({**good, "m.g_idx": np.full(64, 2, np.int32)}, settings)
    with pytest.raises(ConfigError, match="bits is '4'"):
        view(good, {**settings, "bits": "4"})
    with pytest.raises(UnsupportedModelError, match="5 bits in groups of 32"):
        view(good, {**settings, "bits": 5})
    with pytest.raises(UnsupportedModelError, match="'marlin'"):
        view(good, {**settings, "checkpoint_format": "marlin"})
    with pytest.raises(UnsupportedModelError, match="'gemv'"):
        view(good, {"quant_method": "awq", "version": "gemv"})
    with pytest.raises(UnsupportedModelError, match="packed format"):
        view({"m.weight_packed": good["m.qweight"]}, {"quant_method": "compressed-tensors"})
