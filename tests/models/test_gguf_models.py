"""GGUF files give the logits of the checkpoints that they were made from."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import ConfigError, UnsupportedModelError
from mlxlm.models import load_model
from mlxlm.models.families import gguf_family
from mlxlm.models.family import GgufTensors

FILES = sorted((Path(__file__).parent.parent / "fixtures" / "gguf").glob("*.gguf"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_equal_transformers(path, expected_of):
    expected = expected_of(path.stem)
    logits = np.array(load_model(path)(mx.array(expected["tokens"][:1])))[0]
    # The frequencies of the scaled file went through float32 factors.
    assert np.abs(logits - expected["logits"][0]).max() < 2e-4
    assert (logits.argmax(-1) == expected["logits"][0].argmax(-1)).all()


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(UnsupportedModelError, match=r"'llamma'.*did you mean 'llama'"):
        gguf_family("llamma")


def test_unknown_metadata_is_refused():
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.frobnication": 3,
    }
    with pytest.raises(ConfigError, match=r"llama\.attention\.frobnication"):
        gguf_family("llama").gguf.config(metadata, GgufTensors(frozenset(), lambda name: []))
