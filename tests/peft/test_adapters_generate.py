"""Adapters around whole parts of a block, in decoding steps and in training after them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlxlm
from mlxlm import peft
from mlxlm.models import load_model


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel-adapter", "lora", "prefix"])
def test_a_model_generates_with_an_adapter_as_its_logits_say(name, tiny_directory):
    model, tokenizer = mlxlm.load(tiny_directory)
    mx.random.seed(0)
    peft.apply(model, peft.METHODS[name]())
    tokens = tokenizer.encode("the cat")
    for _ in range(4):
        tokens.append(int(np.array(model(mx.array([tokens]))[0, -1]).argmax()))
    text = mlxlm.generate(model, tokenizer, tokens[:-4], max_tokens=4, temperature=0.0)
    assert text == tokenizer.decode([token for token in tokens[-4:] if token not in tokenizer.stop_ids])


def test_joined_projections_are_for_inference_alone(tiny_directory):
    """After an answer, a short row in training mode is computed as it was before, bit for bit."""
    model, tokens = load_model(tiny_directory), mx.array([[9, 12, 30]])
    model.train()
    expected = np.array(model(tokens))
    model.eval()
    model.join_projections()
    model.train()
    assert np.array_equal(np.array(model(tokens)), expected)
