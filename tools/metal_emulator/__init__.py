"""Run Metal kernels of `mx.fast.metal_kernel` on Linux: see README.md in this folder.

with emulated_metal() as metal:       # mx.fast.metal_kernel now compiles for, and runs on, the emulator
    ...                               # metal.dispatches lists every kernel that ran, with its counters
"""

from tools.metal_emulator.machine import Counters, EmulationError, run_kernel
from tools.metal_emulator.session import Dispatch, Metal, emulated_metal
from tools.metal_emulator.source import KernelSource, capture

__all__ = ["Counters", "Dispatch", "EmulationError", "KernelSource", "Metal", "capture", "emulated_metal", "run_kernel"]
