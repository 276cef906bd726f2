"""Writing GGUF, version 3, little endian: the header of a file, and values as its types store them.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlm.checkpoint.gguf_tensors import NUMBERS, TYPES
from mlxlm.checkpoint.safetensors_writer import FileLayout, bytes_of
from mlxlm.errors import CheckpointError

_ALIGNMENT = 32
# Value types by the numpy dtype of an array, and of plain Python values the one that fits.
_TYPES = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": 7}
_TYPES |= {"uint64": 10, "int64": 11, "float64": 12}
_STRING, _ARRAY, _UINT32, _INT32, _FLOAT32, _BOOL, _UINT64, _INT64 = 8, 9, 4, 5, 6, 7, 10, 11
_VALUES_AT_ONCE = 1 << 22


def gguf_layout(metadata: Mapping[str, Any], entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> FileLayout:
    """The layout of a GGUF file.

    metadata: str, bool, int, float (stored with 32 bits), lists of these, and numpy arrays.  entries: name, type
    ("F32", "Q8_0", ...) and row-major shape of each tensor.
    Raises CheckpointError for values without a type in the format and for rows that are no whole number of blocks.
    """
    infos, positions, position = b"", {}, 0
    entries = list(entries)
    for name, kind, shape in entries:
        _, values, nbytes = TYPES[NUMBERS[kind]]
        if (shape[-1] if shape else 1) % values or len(shape) > 4:
            raise CheckpointError(f"tensor {name!r} of shape {shape} can't be stored as {kind}")
        dims = shape[::-1]
        infos += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, NUMBERS[kind], position)
        size = math.prod(shape) // values * nbytes
        positions[name] = position, size
        position += size + -size % _ALIGNMENT
    keys = b"".join(_string(key) + _value(key, value) for key, value in metadata.items())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)) + keys + infos
    head += bytes(-len(head) % _ALIGNMENT)
    starts = {name: (len(head) + begin, size) for name, (begin, size) in positions.items()}
    return FileLayout(head, starts, len(head) + position)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """The type and the value."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.name in _TYPES:
        head = struct.pack("<IIQ", _ARRAY, _TYPES[value.dtype.name], len(value))
        return head + np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, (list, tuple)):
        items = [_value(key, item) for item in value]
        kinds = {item[:4] for item in items} or {struct.pack("<I", _INT32)}
        if len(kinds) != 1:
            raise CheckpointError(f"GGUF metadata {key!r}: a list of values of different types")
        return struct.pack("<I", _ARRAY) + kinds.pop() + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, (bool, np.bool_)):
        return struct.pack("<I?", _BOOL, bool(value))
    if isinstance(value, (int, np.integer)):
        value = int(value)
        for kind, code, low, high in (
            (_UINT32, "I", 0, 2**32),
            (_INT32, "i", -(2**31), 0),
            (_UINT64, "Q", 0, 2**64),
            (_INT64, "q", -(2**63), 0),
        ):
            if low <= value < high:
                return struct.pack(f"<I{code}", kind, value)
    if isinstance(value, (float, np.floating)):
        return struct.pack("<If", _FLOAT32, value)
    raise CheckpointError(f"GGUF metadata {key!r}: no type for {type(value).__name__}")


def encode(array: mx.array, kind: str) -> memoryview:
    """The bytes of an array as a tensor of a type: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0. Evaluates it.

    Block types are rounded as ggml does it, by the `gguf` package. Raises CheckpointError for values that F16 can't
    hold.
    """
    floats = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    if kind in floats:
        result = array.astype(floats[kind])
        if kind == "F16" and (mx.isinf(result) & mx.isfinite(array)).any().item():
            raise CheckpointError("there are values too large for float16; write bfloat16 or float32")
        return bytes_of(result)
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.array(array.astype(mx.float32).reshape(-1, TYPES[NUMBERS[kind]][1]))
    if not np.isfinite(values).all():
        raise CheckpointError("there are NaN or infinite values, which can't be quantized")
    at_once = _VALUES_AT_ONCE // values.shape[1]
    starts = range(0, max(len(values), 1), at_once)
    blocks = [quantize(values[start : start + at_once], GGMLQuantizationType[kind]) for start in starts]
    return memoryview(np.concatenate(blocks).reshape(-1))
