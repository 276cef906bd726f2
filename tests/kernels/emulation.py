"""For tests that run Metal kernels on Linux: tools/ on the path, and a skip where there is no C++ compiler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.metal_emulator import attention_cases, compiler

needs_compiler = pytest.mark.skipif(compiler.compiler() is None, reason="needs Linux and g++ or clang++")

__all__ = ["attention_cases", "compiler", "needs_compiler"]
