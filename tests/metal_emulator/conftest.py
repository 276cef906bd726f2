"""The emulator's own tests: tools/ on the path, skipped where there is no C++ compiler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tools.metal_emulator import compiler

    if compiler.compiler() is None:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="the Metal emulator needs Linux and g++ or clang++"))
