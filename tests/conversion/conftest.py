"""Models whose rows divide into the groups of quantized weights, which those of the parity fixtures don't."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlm.models import Transformer, family_of, save

FIXTURES = Path(__file__).parent.parent / "fixtures" / "models"
WIDTHS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 128),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_hidden_size"), 192),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 32),
}


def made(name: str, folder: Path, **changes: object) -> Path:
    """A checkpoint with random weights like the fixture of this name, but 128 wide. changes: of its config.json."""
    values = json.loads((FIXTURES / name / "config.json").read_text())
    values |= {key: value for key, value in WIDTHS.items() if key in values and values[key] is not None}
    if values.get("num_key_value_heads", 1) > 1:
        values["num_key_value_heads"] = values.get("num_attention_heads", 4) // (2 if values.get("head_dim") else 1)
    values |= changes
    mx.random.seed(7)
    model = Transformer(family_of(values).read_config(values))
    save(model, None, folder, family=values["model_type"])
    return folder


@pytest.fixture
def wide(tmp_path):
    """A function: name of a parity fixture -> a fresh checkpoint like it, 128 wide."""
    return lambda name, **changes: made(name, tmp_path / name, **changes)
