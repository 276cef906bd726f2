"""Running one dispatch of an emulated kernel on numpy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np

from tools.metal_emulator import compiler
from tools.metal_emulator.source import KernelSource

THREADGROUP_MEMORY = 32 * 1024
_SPACES = {"device": 0, "constant": 1}


class EmulationError(RuntimeError):
    """The kernel did what no Metal kernel may: the text says what, where, and by which thread."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What one dispatch did. Bytes count every access of every thread; matrix_operations are 8 x 8 x 8."""

    matrix_operations: int = 0
    device_bytes_read: int = 0
    device_bytes_written: int = 0
    constant_bytes_read: int = 0
    threadgroup_bytes_read: int = 0
    threadgroup_bytes_written: int = 0
    threadgroup_barriers: int = 0
    simdgroup_barriers: int = 0
    simdgroup_operations: int = 0
    threadgroups: int = 0
    threadgroup_memory: int = 0

    @property
    def device_bytes(self) -> int:
        return self.device_bytes_read + self.device_bytes_written


class _Counters(ctypes.Structure):
    _fields_ = [(f.name, ctypes.c_uint64) for f in fields(Counters)]


class _Argument(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("space", ctypes.c_int32),
        ("writable", ctypes.c_int32),
        ("name", ctypes.c_char_p),
    ]


class _Dispatch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("arrays", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(_Argument)),
        ("argument_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint32),
        ("threadgroup_memory_limit", ctypes.c_uint32),
    ]


@cache
def _load(path: str) -> tuple[int, int]:
    """Entry point and list of threadgroup arrays of a built kernel."""
    library = ctypes.CDLL(path)
    _libraries.append(library)
    entry = ctypes.c_void_p.in_dll(library, "emulator_entry").value
    arrays = ctypes.c_void_p.in_dll(library, "emulator_array_list").value
    return int(entry or 0), int(arrays or 0)


_libraries: list[ctypes.CDLL] = []  # a library that is dropped would be unloaded under the engine's feet


def run_kernel(
    kernel: KernelSource,
    buffers: Mapping[str, np.ndarray],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    *,
    seed: int = 0,
) -> Counters:
    """Build if needed, and run on flat arrays: one for each argument of the kernel, outputs written in place.

    buffers: by argument name; what the kernel may touch is exactly the array.  grid, threadgroup: in threads.
    seed: of the order in which threads run.  Outputs and threadgroup memory hold NaN before the kernel writes them.
    Raises EmulationError for a data race, an access out of bounds, a read of threadgroup memory that nobody wrote,
    two writers of one output, a divergent barrier or simdgroup operation, and more than 32 KB of threadgroup memory.
    """
    machine = compiler.engine()
    compiler.build([kernel])
    entry, arrays = _load(str(compiler.library_path(kernel)))
    bound = [argument for argument in kernel.arguments if argument.kind != "attribute"]
    # The kernel numbers its regions as its signature does; attributes take a number, too.
    arguments = (_Argument * len(kernel.arguments))()
    for i, argument in enumerate(kernel.arguments):
        if argument.kind == "attribute":
            continue
        array = buffers[argument.name]
        if not array.flags.c_contiguous:
            raise ValueError(f"the buffer {argument.name} is not contiguous")
        arguments[i] = _Argument(
            array.ctypes.data, array.nbytes, _SPACES[argument.space], argument.writable, argument.name.encode()
        )
    extra = set(buffers) - {argument.name for argument in bound}
    if extra:
        raise ValueError(f"the kernel has no arguments {sorted(extra)}")
    counters, message = _Counters(), ctypes.create_string_buffer(1024)
    dispatch = _Dispatch(
        entry, arrays, arguments, len(arguments), (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*threadgroup),
        seed, THREADGROUP_MEMORY,
    )  # fmt: skip
    failed = machine.emulator_dispatch(ctypes.byref(dispatch), ctypes.byref(counters), message, len(message))
    if failed:
        raise EmulationError(f"{kernel.name}: {message.value.decode()}")
    return Counters(**{f.name: getattr(counters, f.name) for f in fields(Counters)})
