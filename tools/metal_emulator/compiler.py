"""Building emulated kernels: one shared library a text, kept by content hash, several at a time."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from tools.metal_emulator.source import KernelSource
from tools.metal_emulator.translate import to_address_spaces, to_cpp

ENGINE = Path(__file__).parent / "engine"
# -fno-strict-aliasing: kernels copy through structs of another type, as Metal lets them.
# -ftrivial-auto-var-init: a variable that a kernel forgot to set holds -1.7e38 or so, not what was there by chance.
_FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
_GCC_FLAGS = ("-ftrivial-auto-var-init=pattern",)


class CompileError(RuntimeError):
    """The C++ compiler rejects an emulated kernel; the text holds its messages."""


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """The C++ compiler to use: $CXX, g++ or clang++; None when there is none, or where this is not Linux."""
    if not sys.platform.startswith("linux"):
        return None
    wanted = os.environ.get("CXX")
    for name in (wanted, "g++", "clang++") if wanted else ("g++", "clang++"):
        if shutil.which(name):
            return name
    return None


def clang() -> str | None:
    """A clang++ or clang for the address-space check, None when there is none."""
    names = ["clang++", "clang", *(f"clang-{version}" for version in range(22, 12, -1))]
    return next((path for name in names if (path := shutil.which(name))), None)


@lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Where built kernels are kept: $XDG_CACHE_HOME/mlxlm/metal_emulator, by the hash of all that they depend on."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hashed = sha256(_version().encode())
    for file in sorted(ENGINE.glob("*.*pp")):
        hashed.update(file.read_bytes())
    folder = base / "mlxlm" / "metal_emulator" / hashed.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@lru_cache(maxsize=1)
def _version() -> str:
    name = compiler()
    if name is None:
        raise CompileError("the emulator needs Linux and a C++ compiler: g++ or clang++")
    first = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return " ".join((name, first, *_flags()))


@lru_cache(maxsize=1)
def _flags() -> tuple[str, ...]:
    probe = subprocess.run(
        [compiler() or "g++", *_GCC_FLAGS, "-x", "c++", "-fsyntax-only", "-"], input="", text=True, capture_output=True
    )
    return (*_FLAGS, *_GCC_FLAGS) if probe.returncode == 0 else _FLAGS


@lru_cache(maxsize=1)
def engine() -> ctypes.CDLL:
    """The engine's library, loaded so that kernels find its symbols."""
    path = cache_folder() / "engine.so"
    if not path.exists():
        _run([str(compiler()), *_flags(), "-O2", "-shared", str(ENGINE / "engine.cpp")], path)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@lru_cache(maxsize=1)
def _include_folder() -> Path:
    """A folder with the shim and its precompiled header, which saves a third of each compilation."""
    header = cache_folder() / "include" / "metal_stdlib.hpp"
    precompiled = header.with_suffix(".hpp.gch")
    if not precompiled.exists():
        header.parent.mkdir(exist_ok=True)
        for file in ENGINE.glob("*.hpp"):
            shutil.copyfile(file, header.parent / file.name)
        _run([str(compiler()), *_flags(), "-x", "c++-header", str(header)], precompiled)
    return header.parent


def library_path(kernel: KernelSource) -> Path:
    """Where the built kernel is, or will be."""
    return cache_folder() / f"{kernel.digest}.so"


def build(kernels: Iterable[KernelSource], jobs: int | None = None) -> None:
    """Build those kernels that the cache does not hold, `jobs` (default: one a core) at a time.

    Raises CompileError with the messages of the first that fails.
    """
    missing = {kernel.digest: kernel for kernel in kernels if not library_path(kernel).exists()}
    if not missing:
        return
    _include_folder()
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        list(pool.map(_build_one, missing.values()))


def _build_one(kernel: KernelSource) -> None:
    path = library_path(kernel)
    source = path.with_suffix(".cpp")
    source.write_text(to_cpp(kernel))
    _run([str(compiler()), *_flags(), "-I", str(_include_folder()), "-shared", str(source)], path)


def _run(command: list[str], output: Path) -> None:
    """Compile into `output`, through a temporary name so that a build that is cut short leaves nothing behind."""
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        raise CompileError(f"{' '.join(command)}\n{done.stderr[:6000]}")
    os.replace(partial, output)


def check_address_spaces(kernel: KernelSource) -> str:
    """What clang says about the kernel as C++ for OpenCL: address spaces, doubles; empty when all is well.

    Raises CompileError when there is no clang.
    """
    name = clang()
    if name is None:
        raise CompileError("the address-space check needs clang")
    command = [
        name, "-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-fsyntax-only", "-Wall", "-Werror",
        "-Wno-unused", "-Wno-unknown-pragmas", "-Wno-pass-failed", "-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64",
        "-I", str(ENGINE), "-",
    ]  # fmt: skip
    done = subprocess.run(command, input=to_address_spaces(kernel), capture_output=True, text=True)
    return done.stderr if done.returncode != 0 else ""
