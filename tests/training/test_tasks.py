"""Losses against numpy: places, heads of every kind, labels, next sentences."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from training_runs import CONFIG, Rows, tiny_model

from mlxlm import peft
from mlxlm.errors import DataError, UnsupportedModelError, UsageError
from mlxlm.models import load_model
from mlxlm.training import LabelLoss, Step, TrainSettings, WordLoss, tasks


def reference(logits, targets, smoothing=0.0, z_loss=0.0):
    logits = np.array(logits, dtype=np.float64)
    log_sum = np.log(np.exp(logits).sum(-1))
    total = 0.0
    for index in zip(*np.nonzero(targets != -100), strict=True):
        target = logits[(*index, targets[index])]
        total += (
            log_sum[index] - (1 - smoothing) * target - smoothing * logits[index].mean() + z_loss * log_sum[index] ** 2
        )
    return total


def value(task, model, batch):
    prepared = {name: mx.array(array) for name, array in task.prepare(batch).items()}
    total, count = task.loss(model, prepared)
    return total.item(), count.item()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "float"])
def test_the_loss_is_that_of_the_models_logits(tied, quantized):
    model = tiny_model(hidden_size=64, intermediate_size=64, tie_word_embeddings=tied)
    if quantized:
        nn.quantize(model, group_size=32, bits=8)
    model.eval()
    batch = Rows().next()
    logits = model(mx.array(batch["tokens"]), key_lengths=mx.array(batch["key_lengths"]))
    total, count = value(WordLoss(label_smoothing=0.1, z_loss=0.01), model, batch)
    assert count == (batch["targets"] != -100).sum()
    assert total == pytest.approx(reference(logits, batch["targets"], 0.1, 0.01), rel=1e-4)
    assert value(WordLoss(label_smoothing=0.1).for_evaluation(), model, batch)[0] == pytest.approx(
        reference(logits, batch["targets"]), rel=1e-4
    )


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_in_training_gradients_are_made_with_the_loss(frozen, monkeypatch):
    asked = []
    kernel = tasks.fused_linear_cross_entropy
    monkeypatch.setattr(
        tasks, "fused_linear_cross_entropy", lambda *a, **k: asked.append(k["one_pass"]) or kernel(*a, **k)
    )
    model = tiny_model(tie_word_embeddings=True, attention_dropout=0.0)
    if frozen:
        model.embeddings.freeze()
    batch = Rows().next()
    gradients = {}
    for training in (True, False):
        model.train(training)
        arrays = {name: mx.array(array) for name, array in WordLoss().prepare(batch).items()}

        def loss(parameters, arrays=arrays):
            model.update(parameters)
            return WordLoss().loss(model, arrays)[0]

        gradients[training] = mx.grad(loss)(model.trainable_parameters())
    assert asked == [True, False]
    for (name, one), (_, two) in zip(tree_flatten(gradients[True]), tree_flatten(gradients[False]), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(two), rtol=1e-4, atol=1e-5, err_msg=name)


def test_logits_are_made_at_the_few_places_that_have_a_target():
    model = tiny_model()
    model.eval()
    batch = Rows(lengths=(32,), rows=4).next()
    batch["targets"][:, 3:] = -100
    prepared = WordLoss().prepare(batch)
    assert prepared["targets"].shape == prepared["places"].shape == (16,)  # 12 or fewer, up to a 16th of 128
    logits = model(mx.array(batch["tokens"]), key_lengths=mx.array(batch["key_lengths"]))
    total, count = value(WordLoss(), model, batch)
    assert count == (batch["targets"] != -100).sum()
    assert total == pytest.approx(reference(logits, batch["targets"]), rel=1e-5)


def test_masked_words_are_learned_at_their_places(fixture_model):
    model = load_model(fixture_model("bert"))
    tokens = np.array([[5, 9, 13, 7, 21, 2], [8, 21, 3, 3, 6, 1]], dtype=np.int32)
    targets = np.full((2, 6), -100, dtype=np.int32)
    targets[0, 1], targets[1, 4] = 4, 11
    batch = {"tokens": tokens, "targets": targets, "token_types": np.zeros((2, 6), dtype=np.int32)}
    words = value(WordLoss(), model, batch)[0]
    assert words == pytest.approx(reference(model(mx.array(tokens)), targets), rel=1e-4)


def next_sentence_reference(model, hidden, labels):
    """Sum of -log p(label) of a tanh pooler and a two-way classifier on the first token, in float64."""
    weights = {name: np.array(array, dtype=np.float64) for name, array in tree_flatten(model.pooler.parameters())}
    pooled = np.tanh(np.array(hidden, dtype=np.float64)[:, 0] @ weights["linear.weight"].T + weights["linear.bias"])
    return reference(pooled @ weights["next_sentence.weight"].T + weights["next_sentence.bias"], labels)


@pytest.mark.parametrize("few", [True, False], ids=["few places", "all places"])
def test_the_mean_of_next_sentences_is_added_to_the_mean_of_words(few, fixture_model):
    model = load_model(fixture_model("bert-pretraining"))
    rng = np.random.default_rng(3)
    tokens, labels = rng.integers(3, 40, (3, 7)).astype(np.int32), np.array([1, 0, 0], dtype=np.int32)
    targets = rng.integers(3, 40, (3, 7)).astype(np.int32)
    if few:
        targets[:, 1:], targets[1] = -100, -100
    kinds = np.repeat([[0, 0, 0, 1, 1, 1, 1]], 3, axis=0).astype(np.int32)
    batch = {"tokens": tokens, "targets": targets, "token_types": kinds, "next_sentence_labels": labels}
    hidden = model.hidden(mx.array(tokens), token_types=mx.array(kinds))
    total, count = value(WordLoss(), model, batch)
    words = reference(model.logits(hidden), targets)
    assert count == (2 if few else 21)
    assert total / count == pytest.approx(words / count + next_sentence_reference(model, hidden, labels) / 3, rel=1e-5)


def test_next_sentences_need_a_head_for_them():
    batch = {**Rows().next(), "next_sentence_labels": np.zeros(3, dtype=np.int32)}
    with pytest.raises(UnsupportedModelError, match="next_sentence_labels"):
        value(WordLoss(), tiny_model(), batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["bert-tokens", "gpt2-tokens", "llama-tokens"])
def test_labels_of_tokens(name, smoothing, fixture_model):
    model = load_model(fixture_model(name))
    tokens = np.array([[5, 9, 13, 7, 4], [8, 21, 3, 0, 0]], dtype=np.int32)
    classes = len(model.config.head.labels)
    labels = np.arange(10).reshape(2, 5) % classes
    labels[0, 2] = labels[1, 3:] = -100
    batch = {"tokens": tokens, "key_lengths": np.array([5, 3], dtype=np.int32), "labels": labels}
    logits = model(mx.array(tokens), key_lengths=mx.array(batch["key_lengths"]))
    assert logits.shape == (2, 5, classes)
    total, count = value(LabelLoss(label_smoothing=smoothing), model, batch)
    assert (total, count) == (pytest.approx(reference(logits, labels, smoothing), rel=1e-4), 7)


@pytest.mark.parametrize("few", [True, False], ids=["few places", "all places"])
@pytest.mark.parametrize(("tied", "target"), [(False, "head.output"), (True, "embeddings.token")], ids=["head", "tied"])
def test_a_head_inside_an_adapter_has_the_loss_of_its_logits(tied, target, few):
    model = tiny_model(tie_word_embeddings=tied, attention_dropout=0.0)
    mx.random.seed(0)
    peft.apply(model, peft.Lora(rank=2, targets=(target,)))
    model.update(tree_map(lambda array: array + mx.random.normal(array.shape), model.trainable_parameters()))
    batch = Rows().next()
    if few:
        batch["targets"][:, 1:] = -100
    logits = model(mx.array(batch["tokens"]), key_lengths=mx.array(batch["key_lengths"]))
    assert model.head.projection(mx.zeros((1, 16)), model.embeddings.token) is None
    total, count = value(WordLoss(label_smoothing=0.1, z_loss=0.01), model, batch)
    assert count == (batch["targets"] != -100).sum()
    assert total == pytest.approx(reference(logits, batch["targets"], 0.1, 0.01), rel=1e-4)
    prepared = {name: mx.array(array) for name, array in WordLoss().prepare(batch).items()}

    def loss(parameters):
        model.update(parameters)
        return WordLoss().loss(model, prepared)[0]

    gradients = tree_flatten(mx.grad(loss)(model.trainable_parameters()))
    assert len(gradients) == 2
    assert all(mx.abs(array).max().item() > 1e-4 for _, array in gradients)


class Plain:
    """A task of a user's own."""

    def for_evaluation(self):
        return self


@pytest.mark.parametrize(
    ("task", "wanted", "expected"),
    [
        (WordLoss(), {"label_smoothing": 0.1, "z_loss": 0.01}, WordLoss(label_smoothing=0.1, z_loss=0.01)),
        (WordLoss(chunk=7, z_loss=0.5), {"label_smoothing": 0.1}, WordLoss(label_smoothing=0.1, z_loss=0.5, chunk=7)),
        (WordLoss(z_loss=0.5), {"z_loss": 0.5}, WordLoss(z_loss=0.5)),
        (LabelLoss(), {"label_smoothing": 0.1}, LabelLoss(label_smoothing=0.1)),
        (WordLoss(z_loss=0.5), {"z_loss": 0.1}, "set it once"),
        (LabelLoss(), {"z_loss": 0.1}, "LabelLoss has no z_loss"),
        (Plain(), {"label_smoothing": 0.1}, "Plain has no label_smoothing"),
    ],
    ids=["words", "one", "equal", "labels", "contradiction", "no such value", "own task"],
)
def test_what_the_settings_say_reaches_the_task_or_is_refused(task, wanted, expected):
    settings = TrainSettings(steps=1, **wanted)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            Step(tiny_model(), task, settings)
    else:
        assert Step(tiny_model(), task, settings).task == expected


@pytest.mark.parametrize("name", ["bert-sequence", "llama-sequence"])
def test_labels_of_sequences(name, fixture_model):
    model = load_model(fixture_model(name))
    tokens = np.array([[5, 9, 13, 7], [8, 21, 3, 0]], dtype=np.int32)
    batch = {"tokens": tokens, "key_lengths": np.array([4, 3], dtype=np.int32), "labels": np.array([1, 0])}
    logits = model(mx.array(tokens), key_lengths=mx.array(batch["key_lengths"]))
    assert value(LabelLoss(), model, batch) == (pytest.approx(reference(logits, batch["labels"]), rel=1e-4), 2)


def test_batches_and_models_that_do_not_fit_are_refused(fixture_model):
    batch = Rows().next()
    tokens = {"tokens": batch["tokens"]}
    with pytest.raises(DataError, match="no targets"):
        WordLoss().prepare(tokens)
    with pytest.raises(DataError, match="no labels"):
        LabelLoss().prepare(tokens)
    with pytest.raises(UnsupportedModelError, match="predicts no words"):
        value(WordLoss(), load_model(fixture_model("llama-sequence")), batch)
    with pytest.raises(UnsupportedModelError, match="no head for labels"):
        value(LabelLoss(), tiny_model(), {**tokens, "labels": np.zeros(3, dtype=np.int32)})


def test_drawn_weights_have_the_recipes_deviations():
    from training_runs import weights_of

    weights = weights_of(tiny_model(hidden_size=128, intermediate_size=256, num_hidden_layers=8, vocab_size=300))
    for name, array in weights.items():
        if "norm" in name:
            assert (array == 1).all()
        else:
            residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            assert array.std() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.05), name
    assert CONFIG["num_hidden_layers"] == 2
