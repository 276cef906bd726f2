"""Alignment goes with every family of decoders and with every method of fine-tuning."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlxlm import peft
from mlxlm.alignment.comparisons import Comparison, comparison_batch
from mlxlm.alignment.preparation import add_value_head
from mlxlm.alignment.reference import log_probabilities, reference
from mlxlm.alignment.tasks import PolicyLoss, PreferenceLoss
from mlxlm.data import Example
from mlxlm.errors import UnsupportedModelError
from mlxlm.models import families

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from test_families_train import FIRST, model_of
from training_runs import tiny_model

# Two pairs of answers to prompts of three tokens, words that every vocabulary has.
ANSWERS = [[5, 9, 13, 7, 11], [5, 9, 13, 8], [6, 4, 10, 12], [6, 4, 10, 3, 14, 9]]
EXAMPLES = [Example(tokens, [False] * 3 + [True] * (len(tokens) - 3)) for tokens in ANSWERS]
DPO = PreferenceLoss(method="dpo", beta=0.5)
FAMILIES = [one for one in families() if one.name in FIRST]


def batch_of(reference):
    """The pairs, with what the reference thinks of their answers."""
    pairs = [
        Comparison([], [], answers=tuple(EXAMPLES[at : at + 2]), pairs=((0, 1),), margins=(0.0,),
                   reference=tuple(reference[at : at + 2]))
        for at in (0, 2)
    ]  # fmt: skip
    return {name: mx.array(array) for name, array in comparison_batch(pairs, 64, 8).items()}


def rollouts_of(model):
    """The same answers as rollouts of PPO, one good and one bad."""
    batch = batch_of(np.zeros(4))
    shape, mask = batch["targets"].shape, batch["targets"] != -100
    gains = mx.where(mask, mx.array([1.0, -1.0, 1.0, -1.0])[:, None], 0.0)
    old = mx.array(np.zeros(shape, dtype=np.float32))
    kept = {name: batch[name] for name in ("tokens", "targets", "key_lengths", "places", "place_targets")}
    given = {"old": old, "advantages": gains, "old_values": old, "returns": gains}
    return {**kept, **given, "mask": mask, "answers": mx.array(4)}


def descended(model, task, batch, rate):
    """The loss before and after one step against the gradient, of the length `rate`."""

    def loss(parameters):
        model.update(parameters)
        total, count = task.loss(model, batch)
        return total / count

    parameters = model.trainable_parameters()
    before, gradient = mx.value_and_grad(loss)(parameters)
    norm = mx.sqrt(sum(array.square().sum() for _, array in tree_flatten(gradient)))
    assert mx.isfinite(norm).item()
    assert norm.item() > 0
    moved = tree_map(lambda array, slope: array - rate * slope / norm, parameters, gradient)
    after = loss(moved)
    model.update(parameters)
    return before.item(), after.item()


def decoder(family):
    """The family's model, or None for one that is no decoder."""
    model = model_of(family)
    config = model.config
    return None if config.has_memory or config.decoder is None or config.fills_blanks else model


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_of_decoders_learns_a_preference_and_from_rewards(family):
    model = decoder(family)
    if model is None:
        with pytest.raises(UnsupportedModelError, match="alignment is for decoders"):
            log_probabilities(model_of(family), EXAMPLES, 4)
        return
    peft.apply(model, peft.Lora(rank=2))
    with reference(model):
        found = log_probabilities(model, EXAMPLES, 4)
    before, after = descended(model, DPO, batch_of(found), 0.05)
    assert before == pytest.approx(np.log(2), abs=1e-5)
    assert after < before
    add_value_head(model)
    before, after = descended(model, PolicyLoss(), rollouts_of(model), 0.05)
    assert after < before


def model_for(method, tiny):
    """A model that the method can be for: one with biases, or one that is quantized, or the usual one."""
    if method == "bitfit":
        return model_of(next(family for family in FAMILIES if family.name == "GPT-2"))
    if method == "qlora":
        model = tiny_model(hidden_size=64, intermediate_size=64, attention_dropout=0.0)
        nn.quantize(model, 64, 4, class_predicate=lambda path, module: isinstance(module, nn.Linear))
        return model
    return tiny[0]


@pytest.mark.parametrize("method", peft.METHODS)
def test_every_method_of_fine_tuning_learns_a_preference_and_has_its_reference(tiny, method):
    model = model_for(method, tiny)
    untouched = log_probabilities(model, EXAMPLES, 4)
    peft.apply(model, peft.METHODS[method](), tokenizer=tiny[1])
    with reference(model):
        found = log_probabilities(model, EXAMPLES, 4)
    np.testing.assert_allclose(found, untouched, atol=1e-4)
    before, after = descended(model, DPO, batch_of(found), 0.05)
    assert after < before
