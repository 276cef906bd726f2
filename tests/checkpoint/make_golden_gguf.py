"""Writes golden.gguf beside this file, with the `gguf` package (pip install gguf) as the independent writer.

Each quantized tensor X.weight has a companion X.expected (F32), its values as gguf.dequantize gives them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, dequantize, quantize

SHAPES = {"flat": (64,), "matrix": (3, 96), "experts": (2, 2, 32)}


def main() -> None:
    rng = np.random.default_rng(7)
    writer = GGUFWriter(Path(__file__).with_name("golden.gguf"), "golden")
    writer.add_key_value("test.uint8", 200, GGUFValueType.UINT8)
    writer.add_key_value("test.int8", -100, GGUFValueType.INT8)
    writer.add_key_value("test.uint16", 60000, GGUFValueType.UINT16)
    writer.add_key_value("test.int16", -30000, GGUFValueType.INT16)
    writer.add_key_value("test.uint32", 4_000_000_000, GGUFValueType.UINT32)
    writer.add_key_value("test.int32", -2_000_000_000, GGUFValueType.INT32)
    writer.add_key_value("test.uint64", 2**63 + 5, GGUFValueType.UINT64)
    writer.add_key_value("test.int64", -(2**62), GGUFValueType.INT64)
    writer.add_key_value("test.float32", 0.5, GGUFValueType.FLOAT32)
    writer.add_key_value("test.float64", 0.1, GGUFValueType.FLOAT64)
    writer.add_key_value("test.bool", True, GGUFValueType.BOOL)
    writer.add_key_value("test.string", "żółw 🐢", GGUFValueType.STRING)
    writer.add_array("test.strings", ["a", "", "Ġthe", "日本"])
    writer.add_array("test.ints", [-1, 2, 3])
    writer.add_array("test.floats", [0.25, -1.5])
    writer.add_array("test.bools", [True, False, True])
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        for name, shape in SHAPES.items():
            values = rng.normal(size=shape).astype(np.float32)
            values[..., :32] *= 100  # scales of different size, and one block of zeros
            if name == "matrix":
                values[1, 32:64] = 0
            blocks = quantize(values, GGMLQuantizationType[kind])
            writer.add_tensor(f"{kind}.{name}.weight", blocks, raw_dtype=GGMLQuantizationType[kind])
            expected = dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float32)
            writer.add_tensor(f"{kind}.{name}.expected", expected)
    plain = rng.normal(size=(3, 5)).astype(np.float32)
    writer.add_tensor("plain.f32", plain)
    writer.add_tensor("plain.f16", plain.astype(np.float16))
    bits = quantize(plain, GGMLQuantizationType.BF16)
    writer.add_tensor("plain.bf16", bits, raw_dtype=GGMLQuantizationType.BF16)
    writer.add_tensor("plain.bf16.expected", dequantize(bits, GGMLQuantizationType.BF16))
    for name in ("int8", "int16", "int32", "int64"):
        writer.add_tensor(f"plain.{name}", np.arange(-4, 4, dtype=name).reshape(2, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
