"""Every family trains: a few steps on its fixture lower the loss, with all weights and with low-rank adapters."""

from __future__ import annotations

import json
from pathlib import Path

import blank_filler
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlm import peft
from mlxlm.layers import Spec
from mlxlm.models import Transformer, families, family_of, load_model
from mlxlm.training import TrainSettings, WordLoss
from mlxlm.training.initialisation import initialise
from mlxlm.training.step import Step

FIXTURES = Path(__file__).parent.parent / "fixtures" / "models"
# Two families that no fixture is of, since transformers has no class for them.
CONFIGS = {
    "GLM (original)": blank_filler.config(),
    "PaLM": {"model_type": "palm", "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "head_dim": 6,
             "num_attention_heads": 3, "intermediate_size": 30},
}  # fmt: skip
LENGTHS = [9, 5]


def first_fixtures():
    """Of each family by name, the first fixture that predicts words."""
    found = {}
    for path in sorted(FIXTURES.iterdir()):
        values = json.loads((path / "config.json").read_text())
        family = family_of(values)
        own = (path / "model.safetensors").exists() and family.name not in found
        if own and family.read_config(values).predicts_words:
            found[family.name] = path
    return found


FIRST = first_fixtures()


def without_dropout(plain):
    """The JSON of a spec with every dropout left at 0, so that a few steps are enough to see the loss fall."""
    if isinstance(plain, dict):
        return {name: without_dropout(value) for name, value in plain.items() if name != "dropout"}
    return [without_dropout(value) for value in plain] if isinstance(plain, list) else plain


def model_of(family):
    loaded = load_model(FIRST[family.name]) if family.name in FIRST else None
    config = family.read_config(CONFIGS[family.name]) if loaded is None else loaded.config
    model = Transformer(Spec.from_json(without_dropout(config.to_json())))
    if loaded is None:
        initialise(model, 1, scale=0.2)
    else:
        model.update(loaded.parameters())
    return model


def batch_for(model):
    """Two rows, the second padded; the words to predict are few, so that there is something to learn."""
    draw = np.random.default_rng(0)
    words = model.config.embeddings.vocab_size
    tokens = draw.integers(3, words, (2, LENGTHS[0])).astype(np.int32)
    targets = draw.integers(3, 6, tokens.shape).astype(np.int32)
    batch = {"tokens": tokens, "key_lengths": np.array(LENGTHS, np.int32), "targets": targets}
    if model.config.has_memory:
        return {**batch, "decoder_tokens": tokens[:, ::-1].copy()}
    targets[1, LENGTHS[1] :] = -100
    return batch


def weights_of(model):
    return {name: mx.array(array) for name, array in tree_flatten(model.parameters())}


def trained(model):
    """Loss before and after a few steps on one batch."""
    settings = TrainSettings(steps=4, learning_rate=0.01, schedule="constant", compile=False)
    step, batch = Step(model, WordLoss(), settings), batch_for(model)
    losses = [step.evaluate(batch)]
    for number in range(settings.steps):
        outcome = step([batch], settings.rate(number))
        assert outcome.valid.item()
    losses.append(step.evaluate(batch))
    step.close()
    counts = {count for _, count in losses}
    assert counts == {int((batch["targets"] != -100).sum())}
    return [loss for loss, _ in losses]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_training_all_weights_lowers_the_loss_and_moves_each_of_them(family):
    model = model_of(family)
    before = weights_of(model)
    first, last = trained(model)
    assert last < 0.95 * first
    still = [name for name, array in weights_of(model).items() if mx.array_equal(array, before[name])]
    assert not still


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_low_rank_adapters_lower_the_loss_and_leave_the_model_alone(family):
    model = model_of(family)
    before = weights_of(model)
    peft.apply(model, peft.Lora(rank=4, alpha=16))
    first, last = trained(model)
    assert last < 0.98 * first
    after = weights_of(peft.unload(model))
    assert sorted(after) == sorted(before)
    assert all(mx.array_equal(array, after[name]) for name, array in before.items())
