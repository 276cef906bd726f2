"""The model that comes with the package: it loads, it is small, and it knows Python better than chance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlxlm
from mlxlm.cli.options import shipped_model

# A held-out module's kind of text, written for this test.
TEXT = '''import os


def read_lines(path):
    """Return the lines of a file."""
    with open(path, encoding="utf-8") as file:
        return [line.rstrip() for line in file]
'''


@pytest.fixture(scope="module")
def shipped():
    return mlxlm.load(shipped_model())


def test_it_is_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in Path(shipped_model()).iterdir()) <= 8e6


def test_it_predicts_python_far_better_than_chance(shipped):
    model, tokenizer = shipped
    tokens = mx.array([tokenizer.encode(TEXT)])
    logits = model(tokens[:, :-1])
    loss = mx.mean(mx.logsumexp(logits, -1) - mx.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0])
    assert loss.item() < 3.5  # chance is log(4096) = 8.3; its held-out loss was 2.5


def test_generate_uses_it_without_a_model():
    done = subprocess.run(
        [sys.executable, "-m", "mlxlm", "generate", "--prompt", "def read_json(path):\n    with open(", "-m", "12"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "path" in done.stdout
