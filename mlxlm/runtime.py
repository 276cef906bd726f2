"""The machine under the models: BLAS on Linux, device, default dtype, memory figures.

This module never imports mlx at its top, because `load_blas` must run before the first `import mlx.core`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

# Debian and Fedora name the pthread build so; conda and pip ship MKL under the last two names.
_BLAS_LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so")


@dataclass(frozen=True, kw_only=True)
class Blas:
    """What happened to the matrix library of MLX's CPU backend.

    name: the library that serves matrix products, or None when MLX's own does.  status: "loaded", "not found",
    "off" (MLXLM_BLAS=off), "too late" (mlx was imported first) or "not needed" (macOS has Accelerate).
    """

    status: str
    name: str | None = None

    def advice(self) -> str:
        """What the user can do, empty when all is well."""
        if self.status == "not found":
            return (
                "install OpenBLAS for up to 50 times faster float32 matrix products: apt install libopenblas0-pthread"
            )
        if self.status == "too late":
            return "import mlxlm before mlx, otherwise MLX keeps its slow built-in BLAS"
        return ""


_blas: Blas | None = None


def load_blas() -> Blas:
    """Make a fast BLAS serve MLX's CPU backend on Linux. Idempotent; never raises.

    MLX's Linux wheel carries the reference BLAS (about 2 GFLOP/s). Its calls go through the public `cblas_*gemm`
    symbols, so a library opened with RTLD_GLOBAL before mlx is loaded takes them over (about 110 GFLOP/s on two
    cores). MLXLM_BLAS=off keeps MLX's own; any other value is a library to open instead of the usual ones.
    """
    global _blas
    if _blas is None:
        _blas = _load_blas(os.environ.get("MLXLM_BLAS", ""))
    return _blas


def _load_blas(choice: str) -> Blas:
    if not sys.platform.startswith("linux"):
        return Blas(status="not needed")
    if choice.lower() in ("off", "0", "no", "false"):
        return Blas(status="off")
    if "mlx.core" in sys.modules:
        return Blas(status="too late")
    for name in (choice,) if choice else _BLAS_LIBRARIES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(library, "cblas_sgemm"):
            return Blas(status="loaded", name=name)
    return Blas(status="not found")


def backend() -> str:
    """The compute backend that MLX's default device stands for: "metal", "cuda" or "cpu"."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def default_dtype(checkpoint_dtype: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in: the checkpoint's on a GPU, float32 on the CPU.

    MLX's CPU matrix products are about ten times slower in 16 bits than in float32.
    """
    import mlx.core as mx

    return mx.float32 if backend() == "cpu" else checkpoint_dtype


# Metal's own for large chips. On CUDA the default is about 20 times that.
_GRAPH_MEGABYTES = "50"


def small_command_graphs() -> bool:
    """Let MLX's CUDA backend hand its work to the GPU in small pieces; whether that is so now.

    For runs that must be frugal, which recompute layers or are made to fit: MLX keeps all arrays of a piece until it
    has run, and looks at its memory limit between pieces, so a piece of the default size alone may take a gigabyte.
    Ordinary runs are faster in large pieces. Sets MLX_MAX_MB_PER_BUFFER in the environment of this process, unless it
    has a value, which stays. MLX reads it once, so the call must come before the first operation on the GPU: False when
    it is too late. On macOS, where pieces are small anyway, it does nothing.
    """
    name = "MLX_MAX_MB_PER_BUFFER"
    if not sys.platform.startswith("linux") or os.environ.get(name):
        return True
    mlx = sys.modules.get("mlx.core")
    if mlx is not None and mlx.get_peak_memory():
        return False
    os.environ[name] = _GRAPH_MEGABYTES
    return True


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of the device in bytes; None where the backend does not say.

    total: physical (unified) memory.  working_set: what the device recommends to use at most.
    active, peak, cache: MLX's own figures for this process.
    """

    total: int | None
    working_set: int | None
    active: int
    peak: int
    cache: int


def memory() -> Memory:
    """Memory figures of the default device, see `Memory`."""
    import mlx.core as mx

    info = mx.device_info()
    total = info.get("memory_size") or info.get("total_memory")
    if total is None and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    working_set = info.get("max_recommended_working_set_size")
    return Memory(
        total=int(total) if total else None,
        working_set=int(working_set) if working_set else None,
        active=mx.get_active_memory(),
        peak=mx.get_peak_memory(),
        cache=mx.get_cache_memory(),
    )
