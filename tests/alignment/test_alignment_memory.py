"""Log probabilities take memory that grows with the length of the answers and not with the vocabulary."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm import peft, runtime
from mlxlm.alignment import log_probabilities
from mlxlm.alignment.log_probabilities import answer_log_probabilities, with_places
from mlxlm.kernels import cross_entropy

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from training_runs import tiny_model


def peak(vocabulary: int, length: int, target: str = "query") -> int:
    """Bytes of log probabilities and their gradient by an adapter at a target, what the model itself takes left out."""
    model = tiny_model(
        vocab_size=vocabulary, num_hidden_layers=1, attention_dropout=0.0, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    peft.apply(model, peft.Lora(rank=2, targets=(target,)))
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length) % 40
    batch = {"tokens": tokens, "targets": tokens, "key_lengths": np.full(2, length, dtype=np.int32)}
    arrays = {name: mx.array(array) for name, array in with_places(batch).items()}
    mx.eval(model.parameters(), arrays)
    trained = model.trainable_parameters()

    def loss(parameters):
        model.update(parameters)
        return answer_log_probabilities(model, arrays).sum()

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    limit = mx.set_memory_limit(1)  # MLX then waits for each operation, so that the peak is that of the computation
    try:
        mx.eval(mx.value_and_grad(loss)(trained))
    finally:
        mx.set_memory_limit(limit)
    return mx.get_peak_memory() - before


@pytest.mark.skipif(runtime.backend() != "cpu", reason="GPUs run ahead, so peaks of small steps say nothing")
@pytest.mark.parametrize("target", ["query", "head.output"])
def test_memory_does_not_grow_with_the_vocabulary(target, monkeypatch):
    """With an adapter around the head too, but for its own gradient, which has a row a word."""
    monkeypatch.setattr(log_probabilities, "_PART_BYTES", 2**18)
    monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", 2**18)
    small, large = (min(peak(words, 128, target) for _ in range(2)) for words in (2_000, 8_000))
    gradient = 0 if target == "query" else 6 * 4 * 2 * 8_000
    assert large < 0.5 * (2 * 128 * 8_000 * 4)
    assert large - gradient < 1.2 * small


@pytest.mark.slow
@pytest.mark.parametrize("target", ["query", "head.output"])
def test_memory_is_that_of_the_length_and_not_of_the_vocabulary(target):
    small, large, longer = peak(32_000, 1024, target), peak(128_000, 1024, target), peak(128_000, 2048, target)
    logits = 2 * 1024 * 128_000 * 4
    assert large < 0.4 * logits
    assert large < 1.2 * small
    assert longer < 2.2 * large
