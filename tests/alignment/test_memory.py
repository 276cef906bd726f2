"""Log probabilities take memory that grows with the length of the answers and not with the vocabulary."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm import peft
from mlxlm.alignment.log_probabilities import answer_log_probabilities, with_places

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from training_runs import tiny_model


def peak(vocabulary: int, length: int) -> int:
    """Bytes of log probabilities and their gradient by an adapter, what the model itself takes left out."""
    model = tiny_model(vocab_size=vocabulary, num_hidden_layers=1, attention_dropout=0.0, max_position_embeddings=4096)
    peft.apply(model, peft.Lora(rank=2))
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
    mx.eval(mx.value_and_grad(loss)(trained))
    return mx.get_peak_memory() - before


@pytest.mark.slow
def test_memory_is_that_of_the_length_and_not_of_the_vocabulary():
    small, large, longer = peak(32_000, 1024), peak(128_000, 1024), peak(128_000, 2048)
    logits = 2 * 1024 * 128_000 * 4
    assert large < 0.4 * logits
    assert large < 1.2 * small
    assert longer < 2.2 * large
