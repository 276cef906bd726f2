"""The text that MLX would hand to Apple's compiler: how to get it on Linux, and what its signature says."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of the kernel. name: as in the text, such as "query" or "query_strides".

    type: the element type.  space: "device" or "constant".  kind: "pointer", "reference" or "attribute" (a position
    in the grid; its `name` is the attribute).  writable: an output.
    """

    name: str
    type: str
    kind: str
    space: str = ""
    writable: bool = False


@dataclass(frozen=True, kw_only=True)
class KernelSource:
    """A generated kernel. text: all of it.  name: of the function.  arguments: in order.  body: span in the text."""

    text: str
    name: str
    arguments: tuple[Argument, ...]
    signature: tuple[int, int]

    @property
    def digest(self) -> str:
        """A short hash of the text."""
        return sha256(self.text.encode()).hexdigest()[:24]


_KERNEL = re.compile(r"\[\[kernel\]\]\s*void\s+(\w+)\s*\((.*?)\)\s*\{", re.DOTALL)
_BUFFER = re.compile(
    r"(?P<const>const\s+)?(?P<space>device|constant)\s+(?P<type>\w+)\s*(?P<kind>[*&])\s*(?P<name>\w+)\s*"
    r"\[\[buffer\(\d+\)\]\]"
)
_ATTRIBUTE = re.compile(r"(?P<type>\w+)\s+(?P<name>\w+)\s*\[\[(?P<attribute>\w+)\]\]")


def parse(text: str) -> KernelSource:
    """Read the signature of a generated kernel. Raises ValueError when it holds none, or more than is understood."""
    found = list(_KERNEL.finditer(text))
    if len(found) != 1:
        raise ValueError(f"expected one kernel function in the text, found {len(found)}")
    match = found[0]
    arguments = []
    for part in _split_arguments(match.group(2)):
        if buffer := _BUFFER.fullmatch(part):
            kind = "pointer" if buffer["kind"] == "*" else "reference"
            arguments.append(
                Argument(
                    name=buffer["name"],
                    type=buffer["type"],
                    kind=kind,
                    space=buffer["space"],
                    writable=not buffer["const"],
                )
            )
        elif attribute := _ATTRIBUTE.fullmatch(part):
            arguments.append(Argument(name=attribute["attribute"], type=attribute["type"], kind="attribute"))
        else:
            raise ValueError(f"can't read the kernel argument {part!r}")
    return KernelSource(text=text, name=match.group(1), arguments=tuple(arguments), signature=match.span())


def _split_arguments(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


_BLOCK = re.compile(r"Generated source code for `[^`]*`:\n```\n(.*?)\n```\n", re.DOTALL)


def capture(function: Callable[..., Any], *arrays: mx.array) -> list[KernelSource]:
    """The kernels that `function(*arrays)` would launch, traced without running any: works without a Metal device.

    The function must call its metal_kernel objects with verbose=True; MLX then prints what it generates.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdout"
        with _stdout_in(path):
            mx.export_function(str(Path(folder) / "trace.mlxfn"), function, *arrays)
        return [parse(text) for text in _BLOCK.findall(path.read_text())]


@contextmanager
def _stdout_in(path: Path) -> Iterator[None]:
    """Send what C and C++ code prints to a file."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    saved = os.dup(1)
    try:
        with open(path, "wb") as file:
            os.dup2(file.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)


@lru_cache(maxsize=1)
def real_metal_kernel() -> Callable[..., Any]:
    """MLX's own `mx.fast.metal_kernel`, whatever stands in its place now."""
    return mx.fast.metal_kernel


real_metal_kernel()  # before anybody replaces it
