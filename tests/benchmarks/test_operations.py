"""The count of a training step's kernels: what it says of our steps, so that none creeps in unseen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def counted(*flags):
    """Operations of a layer and once, by mode."""
    done = subprocess.run(
        [sys.executable, "tools/benchmarks/operations.py", *flags], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(\w+)\s+mlxlm\s+(\d+)\s+(\d+)", done.stdout, re.MULTILINE)
    return {mode: (int(layer), int(once)) for mode, layer, once in lines}


@pytest.mark.slow
def test_a_step_takes_no_more_kernels_than_it_did():
    for flags, most in (((), {"lora": 89, "full": 67}), (("--masters",), {"lora": 89, "full": 74})):
        found = counted(*flags)
        assert found.keys() == most.keys()
        for mode, (layer, once) in found.items():
            # Eight products of each of seven adapted layers, or three of each that learns, are among them.
            assert (56 if mode == "lora" else 21) < layer <= most[mode]
            assert 0 < once < 60


@pytest.mark.slow
def test_operations_of_a_layer_are_named():
    (layer, _) = counted("--mode", "lora", "--list")["lora"]
    assert layer > 0
