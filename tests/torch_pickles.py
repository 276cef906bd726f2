"""Files of PyTorch put together by hand, opcode by opcode, for tests without PyTorch."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def named(full: str) -> bytes:
    module, _, name = full.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(key: str = "0", count: int = 6, kind: str = "torch.FloatStorage") -> bytes:
    return group(word("storage"), named(kind), word(key), word("cpu"), number(count)) + b"Q"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, held: bytes | None = None) -> bytes:
    sizes, steps = group(*map(number, shape)), group(*map(number, strides))
    arguments = group(
        held or storage(), number(offset), sizes, steps, b"\x89", named("collections.OrderedDict") + b")R"
    )
    return named("torch._utils._rebuild_tensor_v2") + arguments + b"R"


def state(**items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(word(name) + item for name, item in items.items()) + b"u."


def archive(path: Path, content: bytes, data: bytes = bytes(24), *, compress: bool = False, key: str = "0") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/byteorder", "little")
    return path


def state_archive(path: Path, arrays: dict) -> Path:
    """The file that torch.save writes of named numpy arrays; those of dtype uint16 stand for bfloat16."""
    kinds = {"float32": "Float", "float16": "Half", "uint16": "BFloat16", "int64": "Long", "int32": "Int"}
    content = b"\x80\x02}("
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for key, (name, array) in enumerate(arrays.items()):
            file.writestr(f"archive/data/{key}", array.tobytes())
            strides = tuple(stride // array.itemsize for stride in array.strides)
            held = storage(str(key), array.size, f"torch.{kinds[array.dtype.name]}Storage")
            content += word(name) + tensor(array.shape, strides, 0, held)
        file.writestr("archive/data.pkl", content + b"u.")
    return path
