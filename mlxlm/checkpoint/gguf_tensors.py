"""The tensor types of GGUF, and their conversion to MLX arrays.

A block of a quantized type holds 32 consecutive values of a row: d (float16), for Q4_1 also m (float16), then the
integers. Value = d * (q - 8) in Q4_0, d * q + m in Q4_1, d * q in Q8_0 (q signed). In 4 bits, byte k of a block holds
value k in its low half and value k + 16 in its high half.
MLX's affine form has value = scale * q + bias with q unsigned, and packs consecutive values from the low bits up.

Why not mx.load, which reads these files too: it reads all tensors at once, makes float16 of BF16 (and of Q2_K, Q4_K and
Q6_K), leaves out types it doesn't know (MXFP4, TQ1_0, ...) without a word, and ends the process on a float64 in the
metadata (MLX 0.32.4). The packed arrays made here are the same, bit for bit.

All other block types come as float32 values, computed by the `gguf` package, which llama.cpp's authors keep; Q8_1, Q8_K
and Q1_0, which it leaves out, are computed here. It is imported when a file needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlxlm.checkpoint.quantization import Quantization
from mlxlm.checkpoint.tensors import TensorInfo
from mlxlm.errors import CheckpointError

# Number in the file: (name, values in a block, bytes of a block).
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
PLAIN_TYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F64": "float64",
}
QUANTIZED_TYPES = {"Q4_0": Quantization(4, 32), "Q4_1": Quantization(4, 32), "Q8_0": Quantization(8, 32)}
_BLOCK_BYTES = {name: nbytes for name, _, nbytes in TYPES.values()}
# Values and bytes of a block, of the types that have blocks.
_BLOCKS = {name: (values, nbytes) for name, values, nbytes in TYPES.values() if values > 1}

# Blocks read and repacked at once: they stay in the second-level cache, and no second copy of a tensor is made.
_BLOCKS_AT_ONCE = 8192
# Values computed at once where a library makes large temporaries of each.
_VALUES_AT_ONCE = 1 << 20


class GgufReader:
    """Reads the tensors of one file, one after the other, so that memory stays near that of the arrays themselves."""

    def __init__(self, path: Path, positions: dict[str, int]) -> None:
        """positions: of each tensor's first byte in the file."""
        self.path = path
        self.positions = positions

    def __call__(self, wanted: list[TensorInfo]) -> dict[str, mx.array]:
        arrays: dict[str, mx.array] = {}
        try:
            with open(self.path, "rb") as file:
                for tensor in wanted:
                    file.seek(self.positions[tensor.name])
                    new = self._read(file, tensor)
                    if clash := arrays.keys() & new.keys():
                        raise CheckpointError(f"{self.path}: the parts of {tensor.name!r} clash with {min(clash)!r}")
                    arrays |= new
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be read: {error.strerror or error}") from error
        return arrays

    def _read(self, file: BinaryIO, tensor: TensorInfo) -> dict[str, mx.array]:
        if tensor.quantization is not None:
            return self._read_blocks(file, tensor)
        if tensor.dtype in _BLOCKS:
            return {tensor.name: self._read_values(file, tensor)}
        return self._read_plain(file, tensor)

    def _read_values(self, file: BinaryIO, tensor: TensorInfo) -> mx.array:
        """The float32 values that blocks stand for, of any shape."""
        values, nbytes = _BLOCKS[tensor.dtype]
        count = tensor.nbytes // nbytes
        result = np.empty((count, values), np.float32)
        at_once = _VALUES_AT_ONCE // values
        for start in range(0, count, at_once):
            blocks = np.empty((min(at_once, count - start), nbytes), np.uint8)
            self._fill(file, blocks)
            result[start : start + len(blocks)] = values_of_blocks(tensor.dtype, blocks)
        return mx.array(result.reshape(tensor.shape))

    def _read_plain(self, file: BinaryIO, tensor: TensorInfo) -> dict[str, mx.array]:
        # numpy has no bfloat16: its bits travel as uint16.
        dtype = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype).newbyteorder("<")
        values = np.empty(tensor.nbytes // dtype.itemsize, dtype)
        self._fill(file, values)
        if tensor.dtype == "float64":
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        array = mx.array(values.reshape(tensor.shape))
        return {tensor.name: array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array}

    def _read_blocks(self, file: BinaryIO, tensor: TensorInfo) -> dict[str, mx.array]:
        """The weight (..., n * bits / 32) uint32, and scales and biases (..., n / 32) float16."""
        halves = _BLOCK_BYTES[tensor.dtype] // 2
        count = tensor.nbytes // (2 * halves)
        packed = np.empty((count, tensor.quantization.bits * 4), np.uint8)
        scales, biases = np.empty(count, np.float16), np.empty(count, np.float16)
        buffer = np.empty((min(count, _BLOCKS_AT_ONCE), halves), "<u2")
        for start in range(0, count, _BLOCKS_AT_ONCE):
            rows = slice(start, min(start + _BLOCKS_AT_ONCE, count))
            blocks = buffer[: rows.stop - start]
            self._fill(file, blocks)
            _REPACK[tensor.dtype](blocks, packed[rows], scales[rows], biases[rows])
        if (np.isinf(biases) & np.isfinite(scales)).any():
            raise CheckpointError(f"{self.path}: tensor {tensor.name!r} has scales too large for a float16 bias")
        # A row of n values: n * bits / 32 words, n / 32 groups.
        *rows_shape, groups = *tensor.shape[:-1], tensor.shape[-1] // 32
        words = packed.reshape(-1).view(np.uint32).reshape(*rows_shape, groups * tensor.quantization.bits)
        prefix = tensor.name.removesuffix(".weight")
        return {
            f"{prefix}.weight": mx.array(words),
            f"{prefix}.scales": mx.array(scales.reshape(*rows_shape, groups)),
            f"{prefix}.biases": mx.array(biases.reshape(*rows_shape, groups)),
        }

    def _fill(self, file: BinaryIO, buffer: np.ndarray) -> None:
        if buffer.nbytes and file.readinto(memoryview(buffer).cast("B")) != buffer.nbytes:
            raise CheckpointError(f"{self.path} became shorter while it was read")


def values_of_blocks(kind: str, blocks: np.ndarray) -> np.ndarray:
    """The float32 values (n, values of a block) of blocks (n, bytes of a block) uint8.  kind: such as "Q4_K"."""
    with np.errstate(all="ignore"):  # a damaged scale gives NaN or infinity, as it does in every reader
        if kind in _LEFT_OUT:
            return _LEFT_OUT[kind](blocks)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float32, copy=False)


def _values_of_q8_1(blocks: np.ndarray) -> np.ndarray:
    """d and d * sum of the integers, both float16, then 32 integers."""
    return blocks[:, 4:].view(np.int8) * blocks[:, :2].view("<f2").astype(np.float32)


def _values_of_q8_k(blocks: np.ndarray) -> np.ndarray:
    """d float32, 256 integers, then sums of 16 of them each."""
    return blocks[:, 4:260].view(np.int8) * blocks[:, :4].view("<f4")


def _values_of_q1_0(blocks: np.ndarray) -> np.ndarray:
    """d float16, then 128 bits, the lowest of a byte first: d where one is set, else -d."""
    d = blocks[:, :2].view("<f2").astype(np.float32)
    return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), d, -d)


_LEFT_OUT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_1": _values_of_q8_1,
    "Q8_K": _values_of_q8_k,
    "Q1_0": _values_of_q1_0,
}


def _repack_q4_0(blocks: np.ndarray, packed: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> None:
    scales[...] = blocks[:, 0].view(np.float16)
    with np.errstate(over="ignore"):
        np.multiply(scales, np.float16(-8), out=biases)
    _interleave(blocks[:, 1:], packed)


def _repack_q4_1(blocks: np.ndarray, packed: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> None:
    scales[...] = blocks[:, 0].view(np.float16)
    biases[...] = blocks[:, 1].view(np.float16)
    _interleave(blocks[:, 2:], packed)


def _repack_q8_0(blocks: np.ndarray, packed: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> None:
    scales[...] = blocks[:, 0].view(np.float16)
    with np.errstate(over="ignore"):
        np.multiply(scales, np.float16(-128), out=biases)
    # q + 128 of a signed byte is q with its sign bit flipped; two bytes at a time.
    np.bitwise_xor(blocks[:, 1:], np.uint16(0x8080), out=packed.view(np.uint16))


def _interleave(halves: np.ndarray, packed: np.ndarray) -> None:
    """From values k and k + 16 in byte k to consecutive values; `halves` (blocks, 8) are the bytes 2k and 2k + 1."""
    pairs = np.ascontiguousarray(halves)
    high = pairs >> 4
    # The values 2k and 2k + 1 become one byte: of the low halves for the first 16 values, of the high for the rest.
    packed[:, :8] = (pairs & 0x0F) | (high & 0xF0)
    packed[:, 8:] = (high & 0x0F) | ((pairs >> 8) & 0xF0)


_REPACK: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]] = {
    "Q4_0": _repack_q4_0,
    "Q4_1": _repack_q4_1,
    "Q8_0": _repack_q8_0,
}
