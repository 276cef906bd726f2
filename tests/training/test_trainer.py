"""The loop: what it learns, what it counts, what it skips, when it stops, what it keeps."""

from __future__ import annotations

import io
import math
import re

import mlx.core as mx
import numpy as np
import pytest
from training_runs import Fixed, Rows, tiny_model, weights_of

from mlxlm import runtime
from mlxlm.errors import DataError, TrainingError, UsageError
from mlxlm.training import Console, Evaluation, MetricsFile, Reporter, Trainer, TrainSettings, WordLoss, read_metrics

TEXT = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.
However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is
so well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or
other of their daughters. My dear Mr. Bennet, said his lady to him one day, have you heard that Netherfield Park is
let at last? Mr. Bennet replied that he had not. But it is, returned she; for Mrs. Long has just been here, and she
told me all about it. Mr. Bennet made no answer. Do not you want to know who has taken it? cried his wife impatiently.
You want to tell me, and I have no objection to hearing it. This was invitation enough. Why, my dear, you must know,
Mrs. Long says that Netherfield is taken by a young man of large fortune from the north of England; that he came down
on Monday in a chaise and four to see the place, and was so much delighted with it that he agreed with Mr. Morris.
"""


class Events(Reporter):
    def __init__(self):
        self.metrics, self.evaluations, self.messages = [], [], []

    def on_metrics(self, metrics):
        self.metrics.append(metrics)

    def on_evaluation(self, metrics):
        self.evaluations.append(metrics)

    def on_message(self, text):
        self.messages.append(text)


def trainer(source, folder=None, model=None, valid=None, task=None, measure=None, **settings):
    events = Events()
    settings = TrainSettings(**{"steps": 4, "learning_rate": 1e-2, "compile": False, "report_every": 1, **settings})
    model = tiny_model(attention_dropout=0.0) if model is None else model
    made = Trainer(
        model, task or WordLoss(), source, settings, folder, valid=valid, reporters=[events], measure=measure
    )
    return made, events


def reference_loss(model, batches):
    """Sum of -log p(target) and number of targets, in numpy from the model's logits."""
    total, count = 0.0, 0
    for batch in batches:
        logits = np.array(
            model(mx.array(batch["tokens"]), key_lengths=mx.array(batch["key_lengths"])), dtype=np.float64
        )
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, column in zip(*np.nonzero(batch["targets"] != -100), strict=True):
            total -= log_p[row, column, batch["targets"][row, column]]
            count += 1
    return total, count


def test_a_text_of_1_kb_is_memorised():
    data = np.frombuffer(TEXT.encode()[:1024], dtype=np.uint8).astype(np.int32)
    rows = data.reshape(16, 64)
    targets = np.concatenate([rows[:, 1:], np.append(rows[1:, :1], [[-100]], axis=0)], axis=1).astype(np.int32)
    model = tiny_model(
        vocab_size=128, hidden_size=64, intermediate_size=256, num_attention_heads=4, attention_dropout=0.0
    )
    settings = {"steps": 70, "optimizer": "muon", "learning_rate": 3e-2, "warmup_steps": 10, "betas": (0.9, 0.95)}
    training, events = trainer(Fixed([{"tokens": rows, "targets": targets}]), model=model, report_every=10, **settings)
    training.run()
    assert events.metrics[0]["loss"] > 2.0
    assert events.metrics[-1]["loss"] < 0.05


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_loss_is_the_mean_over_all_targets_of_padded_and_accumulated_batches(accumulation):
    source = Rows(batches=3)
    model = tiny_model(attention_dropout=0.0)
    expected = [reference_loss(model, [batch]) for batch in iter(source.next, None)]
    training, events = trainer(Rows(batches=3), model=model, accumulation=accumulation, learning_rate=1e-12, steps=3)
    training.run()
    if accumulation == 1:
        assert [m["loss"] for m in events.metrics] == pytest.approx([total / n for total, n in expected], rel=1e-5)
    else:
        total, count = (sum(column) for column in zip(*expected, strict=True))
        assert events.metrics[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert training.progress.targets == sum(count for _, count in expected)


def test_bug_3_rows_left_over_from_the_last_batch_are_trained_too():
    """Five batches in twos are three updates: the last has one batch, and no row is dropped."""
    training, _ = trainer(Rows(batches=5), accumulation=2, steps=10)
    result = training.run()
    source = Rows(batches=5)
    while source.next() is not None:
        pass
    assert (result.step, result.reason, result.tokens) == (3, "data", source.num_tokens)


def test_bug_5_accumulated_batches_weigh_by_their_targets():
    """The weights after one update from three uneven batches equal those after one update from their union."""
    rows = [Rows(rows=3, lengths=(9,), seed=seed).next() for seed in (0, 1, 2)]
    rows[1]["targets"][:, 1:] = -100
    union = {name: np.concatenate([batch[name] for batch in rows]) for name in rows[0]}
    results = []
    for batches, accumulation in ((rows, 3), ([union], 1)):
        model = tiny_model(attention_dropout=0.0)
        training, _ = trainer(
            Fixed(batches), model=model, accumulation=accumulation, steps=1, optimizer="sgd", learning_rate=1.0
        )
        training.run()
        results.append(weights_of(model))
    start = weights_of(tiny_model(attention_dropout=0.0))
    for name, array in results[0].items():
        change = np.abs(results[1][name] - start[name]).max()
        assert np.abs(array - results[1][name]).max() <= 1e-4 * change + 1e-8, name


def test_gradients_are_clipped_to_their_global_norm():
    before = weights_of(tiny_model(attention_dropout=0.0))
    norms = {}
    for clip in (None, 0.01):
        model = tiny_model(attention_dropout=0.0)
        training, events = trainer(
            Rows(), model=model, steps=1, optimizer="sgd", momentum=0.0, learning_rate=1.0, clip_norm=clip
        )
        training.run()
        after = weights_of(model)
        norms[clip] = math.sqrt(sum(np.square(after[name] - before[name]).sum() for name in before))
        assert events.metrics[0]["gradient_norm"] > 0.1  # what is reported is the norm before clipping
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)
    assert norms[None] == pytest.approx(events.metrics[0]["gradient_norm"], rel=1e-4)


class Poisoned(WordLoss):
    """A loss that is not a number where a batch is marked."""

    def loss(self, model, batch):
        poison = batch.pop("poison")
        total, count = super().loss(model, batch)
        return total * mx.where(poison[0] > 0, mx.nan, 1.0), count


def poisoned(marks):
    return [{**Rows(seed=seed).next(), "poison": np.array([mark])} for seed, mark in enumerate(marks)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_whose_gradient_is_no_number_is_left_out_and_told(optimizer):
    """The poisoned step changes nothing: not the weights, not the optimizer's state, not the average."""
    weights = []
    for marks in ((0, 1, 0), (0, 0)):
        batches = poisoned(marks)
        batches[-1] = {**Rows(seed=7).next(), "poison": np.array([0])}
        model = tiny_model(attention_dropout=0.0)
        training, events = trainer(
            Fixed(batches), model=model, task=Poisoned(), steps=len(marks), schedule="constant",
            optimizer=optimizer, ema_decay=0.5,
        )  # fmt: skip
        result = training.run()
        assert result.skipped == sum(marks)
        weights.append(weights_of(model))
        assert len(events.messages) == sum(marks)
    for name in weights[0]:
        assert np.array_equal(weights[0][name], weights[1][name]), name
        assert np.isfinite(weights[0][name]).all()


def test_too_many_skipped_updates_in_a_row_end_the_run(tmp_path):
    training, events = trainer(
        Fixed(poisoned([0, 1, 1, 1, 1])), tmp_path, task=Poisoned(), steps=10, max_skipped=2, save_every=1
    )
    with pytest.raises(TrainingError, match=r"3 updates in a row .* up to step 4"):
        training.run()
    assert events.messages[0] == "step 2: update skipped (gradient norm nan)"
    assert training.checkpoints.steps()[-1] == 3


def test_a_batch_without_targets_changes_nothing():
    batch = Rows().next()
    batch["targets"][:] = -100
    model = tiny_model()
    training, events = trainer(Fixed([batch]), model=model, steps=1)
    training.run()
    assert events.messages == ["step 1: update skipped (no target in the batch)"]
    before = weights_of(tiny_model())
    assert all(np.array_equal(array, before[name]) for name, array in weights_of(model).items())


def test_the_average_follows_its_formula_and_is_what_the_model_ends_with():
    model = tiny_model(attention_dropout=0.0)
    average = weights_of(model)

    class Follow(Reporter):
        def on_metrics(self, metrics):
            for name, array in training.step.parameters.items():
                average[name] = 0.8 * average[name] + 0.2 * np.array(array)

    training, _ = trainer(Rows(), model=model, steps=5, ema_decay=0.8)
    training.reporters.append(Follow())
    training.run()
    for name, array in weights_of(model).items():
        assert np.abs(array - average[name]).max() < 1e-6


def test_evaluation_is_the_mean_over_the_whole_set_last_partial_batch_included():
    batches = [Rows(rows=rows, seed=rows).next() for rows in (4, 4, 1)]
    model = tiny_model()  # has dropout, which evaluation leaves out
    model.eval()
    total, count = reference_loss(model, batches)
    training, _ = trainer(
        Rows(), model=model, valid=lambda: Fixed(batches, once=True), task=WordLoss(label_smoothing=0.3, z_loss=0.1)
    )
    result = training.evaluate()
    assert result.count == count
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_an_evaluation_is_bounded_says_so_and_how_far_it_is(capsys, monkeypatch):
    import mlxlm.training.reporters as module

    class Counted(Fixed):
        batches_per_epoch = 5

    monkeypatch.setattr(module, "_SILENCE", 0.0)
    batches = [Rows(seed=seed).next() for seed in range(5)]
    losses = {}
    for wanted in (2, 9, -1):
        training, events = trainer(
            Rows(), valid=lambda: Counted(batches, once=True), steps=2, val_batches=wanted, learning_rate=1e-12
        )
        training.reporters.append(Console())
        training.run()
        losses[wanted] = events.evaluations[0]["valid_loss"]
        shown = capsys.readouterr().err
        of = "2 of 5 batches" if wanted == 2 else "all 5 batches"
        assert f"an evaluation goes through {of} of the validation data (val_batches)" in shown
        assert f"step 2  validation 2/{2 if wanted == 2 else 5}\n" in shown
    for wanted, used in ((2, 2), (9, 5), (-1, 5)):
        model = tiny_model()
        model.eval()
        total, count = reference_loss(model, batches[:used])
        assert losses[wanted] == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(UsageError, match="val_batches is 0; expected a number of batches, or -1 for all"):
        trainer(Rows(), val_batches=0)


def test_label_smoothing_and_z_loss_of_the_settings_are_trained_with_and_not_evaluated():
    """The first loss that is reported is numpy's, with both in it."""
    model = tiny_model(attention_dropout=0.0)
    batch = Rows().next()
    logits = np.array(model(mx.array(batch["tokens"]), key_lengths=mx.array(batch["key_lengths"])), dtype=np.float64)
    log_sum = np.log(np.exp(logits).sum(-1))
    valid = batch["targets"] != -100
    target = np.take_along_axis(logits, np.where(valid, batch["targets"], 0)[..., None], axis=-1)[..., 0]
    losses = log_sum - 0.7 * target - 0.3 * logits.mean(-1) + 0.1 * log_sum**2
    training, events = trainer(
        Fixed([batch]), model=model, valid=lambda: Fixed([batch], once=True), steps=1, label_smoothing=0.3, z_loss=0.1
    )
    assert training.evaluate().loss == pytest.approx((log_sum - target)[valid].mean(), rel=1e-5)
    training.run()
    assert events.metrics[0]["loss"] == pytest.approx(losses[valid].mean(), rel=1e-5)


@pytest.mark.parametrize("ending", ["done", "failure"])
@pytest.mark.parametrize("limit", [0, 12_345, None])
def test_bug_4_the_cache_limit_arrives_and_is_put_back(limit, ending):
    class Watch(Reporter):
        seen = None

        def on_metrics(self, metrics):
            self.seen = mx.set_cache_limit(1)
            mx.set_cache_limit(self.seen)
            if ending == "failure":
                raise OSError("no space left")

    before = mx.set_cache_limit(777_777)
    try:
        watch = Watch()
        training, _ = trainer(Rows(), steps=2, cache_limit=limit)
        training.reporters.append(watch)
        if ending == "failure":
            with pytest.raises(OSError, match="no space"):
                training.run()
        else:
            training.run()
        assert watch.seen == (777_777 if limit is None else limit)
        assert mx.set_cache_limit(1) == 777_777
    finally:
        mx.set_cache_limit(before)


@pytest.mark.parametrize("limit", [-1, 0.5])
def test_a_cache_limit_is_a_number_of_bytes(limit):
    with pytest.raises(UsageError, match=r"cache_limit is .* a number of bytes"):
        TrainSettings(steps=1, cache_limit=limit)


def test_validation_data_without_targets_is_refused():
    training, _ = trainer(Rows(), valid=lambda: Fixed([], once=True))
    with pytest.raises(DataError, match="no targets"):
        training.evaluate()


def test_training_stops_early_and_keeps_the_best_checkpoint(tmp_path):
    """Trained on one batch and measured on another of random words, the loss soon rises."""
    valid = Rows(seed=99, rows=8).next()
    training, events = trainer(
        Fixed([Rows().next()]), tmp_path, valid=lambda: Fixed([valid], once=True), steps=60, evaluate_every=2,
        patience=3, keep_last=1, save_every=2, learning_rate=0.02, schedule="constant",
    )  # fmt: skip
    result = training.run()
    losses = [row["valid_loss"] for row in events.evaluations]
    assert result.reason == "early"
    assert len(losses) == losses.index(min(losses)) + 1 + 3
    assert result.best == min(losses)
    assert result.best_step == 2 * (losses.index(min(losses)) + 1)
    assert training.checkpoints.best() == result.best_step
    assert training.checkpoints.steps() == [result.best_step, result.step]


@pytest.mark.parametrize(("wanted", "ema_decay"), [("last", 0.7), ("best", None), ("best", 0.7)])
def test_a_run_ends_with_its_last_weights_or_its_best_ones(wanted, ema_decay, tmp_path):
    valid = Rows(seed=99, rows=8).next()
    saved = {}
    training, events = trainer(
        Fixed([Rows().next()]), tmp_path, valid=lambda: Fixed([valid], once=True), steps=14, evaluate_every=2,
        learning_rate=0.02, schedule="constant", final_weights=wanted, ema_decay=ema_decay,
    )  # fmt: skip
    training.save_model = lambda folder: saved.update(weights_of(training.model))
    result = training.run()
    assert result.best_step < 14
    chosen = training.checkpoints.load(14 if wanted == "last" else result.best_step)
    expected = chosen.arrays["parameters" if ema_decay is None else "average"]
    assert all(np.array_equal(array, saved[name]) for name, array in expected.items())
    assert all(np.array_equal(array, saved[name]) for name, array in weights_of(training.model).items())
    if wanted == "best":
        assert training.evaluate().loss == pytest.approx(result.best, rel=1e-6)
        assert events.messages == [
            f"the weights are those of step {result.best_step}, whose validation loss was lowest"
        ]


def test_the_newest_checkpoints_are_kept(tmp_path):
    training, _ = trainer(Rows(), tmp_path, steps=7, save_every=2, keep_last=2)
    training.run()
    assert training.checkpoints.steps() == [6, 7]


def test_compiled_and_plain_steps_agree_and_compilation_is_bounded_by_the_shapes():
    class Counted(WordLoss):
        traced = 0

        def loss(self, model, batch):
            Counted.traced += 1
            return super().loss(model, batch)

    results = []
    for compiled in (False, True):
        model, Counted.traced = tiny_model(), 0
        training, _ = trainer(Rows(), model=model, task=Counted(), compile=compiled, steps=12, recompute_layers=-1)
        shapes = training.run().shapes
        assert shapes <= 4  # two lengths, and each with its targets at few places or at all
        assert Counted.traced == (shapes if compiled else 12)
        results.append(weights_of(model))
    for name in results[0]:
        assert np.abs(results[0][name] - results[1][name]).max() < 1e-4


def test_bug_11_recomputing_activations_touches_no_other_model():
    other = tiny_model()
    model = tiny_model(attention_dropout=0.0)
    training, _ = trainer(Rows(), model=model, recompute_layers=-1, steps=1)
    assert model.decoder._recomputed == 2
    assert other.decoder._recomputed == 0
    assert type(model.decoder.layers[0]).__call__ is type(other.decoder.layers[0]).__call__
    training.run()
    assert model.decoder._recomputed == 0


@pytest.mark.parametrize("master", [True, False])
def test_bfloat16_computes_on_float32_master_weights(master):
    model = tiny_model(attention_dropout=0.0)
    training, events = trainer(Rows(), model=model, dtype="bfloat16", master_weights=master, steps=3, ema_decay=0.9)
    seen = set()
    original = training.step.task.loss
    object.__setattr__(
        training.step.task, "loss",
        lambda m, b: (seen.add(m.decoder.layers[0].attention.query.weight.dtype), original(m, b))[1],
    )  # fmt: skip
    training.run()
    assert seen == {mx.bfloat16}
    expected = mx.float32 if master else mx.bfloat16
    assert {array.dtype for array in training.step.parameters.values()} == {expected}
    state = training.step.optimizer.arrays()
    assert {array.dtype for name, array in state.items() if name.endswith(("/m", "/v"))} == {expected}
    assert all(math.isfinite(row["loss"]) for row in events.metrics)


def test_only_what_is_trainable_is_trained_and_saved(tmp_path):
    model = tiny_model()
    model.freeze()
    model.decoder.layers[1].feed_forward.unfreeze()
    before = weights_of(model)
    training, _ = trainer(Rows(), tmp_path, model=model, steps=2)
    training.run()
    changed = {name for name, array in weights_of(model).items() if not np.array_equal(array, before[name])}
    assert changed == {f"decoder.layers.1.feed_forward.{part}.weight" for part in ("gate", "up", "down")}
    assert training.checkpoints.load(2).arrays["parameters"].keys() == changed


def test_bug_7_all_of_a_model_is_trained_and_saved_embeddings_norm_and_head_too(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    before = weights_of(model)
    training, _ = trainer(Rows(), tmp_path, model=model, steps=2)
    training.run()
    after = weights_of(model)
    assert all(not np.array_equal(after[name], before[name]) for name in before)
    saved = training.checkpoints.load(2).arrays["parameters"]
    assert saved.keys() == before.keys()
    assert {"embeddings.token.weight", "decoder.norm.weight", "head.output.weight"} <= saved.keys()


def test_bug_8_unknown_settings_are_refused_all_at_once():
    from mlxlm.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        TrainSettings.from_json({"steps": 3, "lerning_rate": 1, "warmup": 2})
    assert "'lerning_rate'; did you mean 'learning_rate'" in str(caught.value)
    assert "'warmup'; did you mean 'warmup_steps'" in str(caught.value)


@pytest.mark.parametrize("name", ["learning_rate", "eps", "weight_decay", "z_loss"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_numbers_that_would_leave_no_weights_are_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        TrainSettings(steps=1, **{name: value})


def test_a_frozen_model_and_empty_data_are_refused():
    model = tiny_model()
    model.freeze()
    with pytest.raises(UsageError, match="nothing to train"):
        trainer(Rows(), model=model)
    with pytest.raises(DataError, match="no batch"):
        trainer(Rows(batches=0))[0].run()
    with pytest.raises(UsageError, match="patience needs"):
        trainer(Rows(), patience=2)
    with pytest.raises(UsageError, match="'best' needs validation data and a folder"):
        trainer(Rows(), final_weights="best")


def test_metrics_are_written_a_line_a_report_and_the_console_says_the_same(tmp_path, capsys):
    training, _ = trainer(Rows(), tmp_path, steps=4, report_every=2, valid=lambda: Rows(batches=2), evaluate_every=4)
    training.reporters += [MetricsFile(tmp_path), Console()]
    training.run()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert {"loss", "learning_rate", "tokens_per_second", "memory", "gradient_norm"} <= rows[0].keys()
    shown = capsys.readouterr().err
    assert f"step 4/4  loss {rows[1]['loss']:.4f}" in shown
    assert "16 bits" not in shown
    assert f"validation loss {rows[2]['valid_loss']:.4f}" in shown


def test_a_terminal_shows_one_line_with_all_that_matters(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    training, events = trainer(Rows(), steps=4, valid=lambda: Rows(batches=2), evaluate_every=2)
    training.reporters.append(Console(stream))
    training.run()
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue())
    last = events.metrics[-1]
    assert re.search(
        rf"4/4 .*loss {last['loss']:.4f}  lr {last['learning_rate']:.2e}  [\d,]+ tokens/s  \d\.\d\d GB", shown
    )
    assert re.search(r"\d:\d\d:\d\d", shown)  # the time left
    assert f"step 4  validation loss {events.evaluations[-1]['valid_loss']:.4f}" in shown


@pytest.mark.skipif(runtime.backend() != "cpu", reason="for the CPU")
def test_the_console_says_that_16_bits_are_slow_on_a_cpu(capsys):
    training, _ = trainer(Rows(), steps=1, dtype="bfloat16")
    training.reporters.append(Console())
    training.run()
    assert "dtype bfloat16: on the CPU products of 16 bits are about ten times slower" in capsys.readouterr().err


def test_the_best_weights_are_told_by_a_measure_and_among_equals_by_the_loss(tmp_path):
    made = [(0.5, 0.9), (0.7, 0.3), (0.7, 0.6), (0.7, 0.2), (0.6, 0.1)]  # accuracy, loss
    found = iter(made)

    def measure():
        accuracy, loss = next(found)
        return Evaluation(loss, 1), {"accuracy": accuracy}

    options = {"steps": 10, "evaluate_every": 2, "final_weights": "best", "best_by": "accuracy"}
    training, events = trainer(Rows(), tmp_path, valid=Rows, measure=measure, **options)
    result = training.run()
    assert (result.best_step, result.best) == (8, 0.2)
    assert training.checkpoints.best() == 8
    assert events.messages == ["the weights are those of step 8, whose accuracy was highest"]
    with pytest.raises(UsageError, match="only the loss is measured"):
        trainer(Rows(), valid=Rows, steps=1, best_by="accuracy")
    options = {"steps": 2, "evaluate_every": 1, "best_by": "accuracy"}
    training, _ = trainer(Rows(), valid=Rows, measure=lambda: (Evaluation(1.0, 1), {"f1": 1.0}), **options)
    with pytest.raises(UsageError, match="'accuracy', which is not measured here"):
        training.run()
