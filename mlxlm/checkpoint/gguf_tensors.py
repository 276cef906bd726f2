"""The tensor types of GGUF, and their conversion to MLX arrays.

A block of a quantized type holds 32 consecutive values of a row: d (float16), for Q4_1 also m (float16), then the
integers. Value = d * (q - 8) in Q4_0, d * q + m in Q4_1, d * q in Q8_0 (q signed). In 4 bits, byte k of a block holds
value k in its low half and value k + 16 in its high half.
MLX's affine form has value = scale * q + bias with q unsigned, and packs consecutive values from the low bits up.

Why not mx.load, which reads these files too: it reads all tensors at once, makes float16 of BF16 (and of Q2_K, Q4_K and
Q6_K), leaves out types it doesn't know (MXFP4, TQ1_0, ...) without a word, and ends the process on a float64 in the
metadata (MLX 0.32.4). The packed arrays made here are the same, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlxlm.checkpoint.quantization import Quantization
from mlxlm.checkpoint.tensors import TensorInfo
from mlxlm.errors import CheckpointError, listing

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
PLAIN_TYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
QUANTIZED_TYPES = {"Q4_0": Quantization(4, 32), "Q4_1": Quantization(4, 32), "Q8_0": Quantization(8, 32)}
_READABLE = frozenset(QUANTIZED_TYPES) | frozenset(PLAIN_TYPES.values())
_BLOCK_BYTES = {name: nbytes for name, _, nbytes in TYPES.values()}

# Blocks read and repacked at once: they stay in the second-level cache, and no second copy of a tensor is made.
_BLOCKS_AT_ONCE = 8192


class GgufReader:
    """Reads the tensors of one file, one after the other, so that memory stays near that of the arrays themselves."""

    def __init__(self, path: Path, positions: dict[str, int]) -> None:
        """positions: of each tensor's first byte in the file."""
        self.path = path
        self.positions = positions

    def __call__(self, wanted: list[TensorInfo]) -> dict[str, mx.array]:
        self._refuse_unreadable(wanted)
        arrays: dict[str, mx.array] = {}
        try:
            with open(self.path, "rb") as file:
                for tensor in wanted:
                    file.seek(self.positions[tensor.name])
                    new = (
                        self._read_plain(file, tensor)
                        if tensor.quantization is None
                        else self._read_blocks(file, tensor)
                    )
                    if clash := arrays.keys() & new.keys():
                        raise CheckpointError(f"{self.path}: the parts of {tensor.name!r} clash with {min(clash)!r}")
                    arrays |= new
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be read: {error.strerror or error}") from error
        return arrays

    def _refuse_unreadable(self, wanted: list[TensorInfo]) -> None:
        counts = Counter(tensor.dtype for tensor in wanted if tensor.dtype not in _READABLE)
        if counts:
            types = listing(f"{count} {kind}" for kind, count in counts.most_common())
            raise CheckpointError(
                f"{self.path}: {counts.total()} of {len(wanted)} tensors are of a type that is not read natively "
                f"({types}); use an F32, F16, BF16, Q8_0, Q4_1 or Q4_0 file of this model, or make one with: "
                f"llama-quantize --allow-requantize {self.path.name} OUTPUT.gguf Q8_0"
            )

    def _read_plain(self, file: BinaryIO, tensor: TensorInfo) -> dict[str, mx.array]:
        # numpy has no bfloat16: its bits travel as uint16.
        dtype = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype).newbyteorder("<")
        values = np.empty(tensor.nbytes // dtype.itemsize, dtype)
        self._fill(file, values)
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
