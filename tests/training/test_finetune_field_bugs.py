"""Eleven bugs that fine-tuning programs have had; each is a test of ours, by its number."""

from __future__ import annotations

import json
import os
import signal

import mlx.core as mx
import numpy as np
import pytest
from finetune_runs import completions, labelled, mean_loss, run, settings, tagged, write
from mlx.utils import tree_flatten

import mlxlm
from mlxlm import peft
from mlxlm.checkpoint import open_safetensors
from mlxlm.errors import ConfigError
from mlxlm.models import load_model
from mlxlm.training import MetricsFile, read_metrics
from mlxlm.training.finetune import FinetuneSettings, prepare

STILL = {"learning_rate": 1e-12, "iters": 1, "samples": 0}  # a run that measures the model as it was


def by_hand(tokenizer, *turns):
    """Tokens and marks of a chat as the template of the tests writes it: <user>..</s><assistant>..</s>."""
    tokens, scored = [], []
    for number, text in enumerate(turns):
        answer = number % 2 == 1
        opening = tokenizer.encode("<assistant>" if answer else "<user>", add_special_tokens=False)
        said = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_id]
        tokens += opening + said
        scored += [False] * len(opening) + [answer] * len(said)
    return tokens, scored


def first_loss(folder):
    return next(row["loss"] for row in read_metrics(folder) if "loss" in row)


def saved(folder):
    """All tensors of an adapter folder or a model directory."""
    return {
        name: np.array(array)
        for path in sorted(folder.glob("*model*.safetensors"))
        for name, array in open_safetensors(path).load().items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_bug_1_the_loss_is_that_of_the_real_targets_of_padded_rows(tiny_directory, tmp_path, packing):
    rows = completions(5)
    data = write(tmp_path / "data", train=rows)
    run(settings(tiny_directory, data, tmp_path / "out", **STILL, batch_size=5, packing=packing, max_seq_length=64))
    model, tokenizer = mlxlm.load(tiny_directory)
    expected = mean_loss(model, [by_hand(tokenizer, row["prompt"], row["completion"]) for row in rows])
    assert first_loss(tmp_path / "out") == pytest.approx(expected, rel=2e-5)


def test_bug_1_the_loss_of_truncated_rows_is_that_of_what_is_left(tiny_directory, tmp_path):
    rows = [{"prompt": "a cat", "completion": "the mat on a mat"}, {"prompt": "the", "completion": "dogs"}]
    data = write(tmp_path / "data", train=rows)
    _, said = run(settings(tiny_directory, data, tmp_path / "out", **STILL, max_seq_length=16))
    model, tokenizer = mlxlm.load(tiny_directory)
    cut = [[part[:16] for part in by_hand(tokenizer, row["prompt"], row["completion"])] for row in rows]
    assert first_loss(tmp_path / "out") == pytest.approx(mean_loss(model, cut), rel=2e-5)
    assert "policy cut-right): 1 cut, 0 dropped" in said


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
def test_bug_1_the_loss_of_chats_is_that_of_the_turns_to_be_learned(tiny_directory, tmp_path, loss_on):
    chats = [("a cat", "the mat", "and dogs", "run"), ("home", "far away")]
    rows = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}
        for turns in chats
    ]
    data = write(tmp_path / "data", train=rows)
    run(settings(tiny_directory, data, tmp_path / "out", **STILL, loss_on=loss_on))
    model, tokenizer = mlxlm.load(tiny_directory)
    marked = [by_hand(tokenizer, *turns) for turns in chats]
    if loss_on == "completion":
        last = len(tokenizer.encode("run", add_special_tokens=False)) + 1
        marked[0] = (marked[0][0], [False] * (len(marked[0][0]) - last) + [True] * last)
    if loss_on == "all":
        marked = [(tokens, [True] * len(tokens)) for tokens, _ in marked]
    assert first_loss(tmp_path / "out") == pytest.approx(mean_loss(model, marked), rel=2e-5)


@pytest.mark.parametrize(("rows", "kind"), [(labelled, "sequence"), (tagged, "tokens")], ids=["texts", "words"])
def test_bug_1_the_loss_of_labels_is_that_of_each_row_alone(tiny_directory, tmp_path, rows, kind):
    data = write(tmp_path / "data", train=rows(7), valid=rows(7))
    made = settings(tiny_directory, data, tmp_path / "out", **{**STILL, "batch_size": 7})
    prepared = prepare(made, say=lambda text: None)
    expected = total = 0.0
    for example in prepared.examples.splits["valid"]:
        logits = np.array(prepared.model(mx.array([example.tokens]))[0], dtype=np.float64).reshape(-1, 2)
        places = example.label if isinstance(example.label, list) else [example.label]
        for row, label in zip(logits, places, strict=True):
            if label >= 0:
                expected, total = expected + np.log(np.exp(row).sum()) - row[label], total + 1
    outcome = prepared.train([MetricsFile(made.folder)])
    assert outcome.before["loss"] == pytest.approx(expected / total, rel=1e-5)
    if kind == "sequence":  # a head over tokens has dropout, so that its training loss is another one
        assert first_loss(tmp_path / "out") == pytest.approx(expected / total, rel=1e-5)


def test_bug_2_rows_of_a_batch_are_of_like_length(tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=completions(240))
    made = settings(tiny_directory, data, tmp_path / "out", epochs=1, iters=None, batch_size=8, valid_fraction=0)
    source = prepare(made, say=lambda text: None).examples.source(made)
    source.multiple = 1
    padded = real = 0
    while (batch := source.next()) is not None:
        padded, real = padded + batch["tokens"].size, real + int(batch["key_lengths"].sum())
    assert real / padded > 0.93


def test_bug_3_rows_left_over_from_the_last_batch_are_trained(tiny_directory, tmp_path):
    rows = completions(7)
    data = write(tmp_path / "data", train=rows)
    made = settings(tiny_directory, data, tmp_path / "out", epochs=2, iters=None, batch_size=4, samples=0)
    outcome, _ = run(made)
    _, tokenizer = mlxlm.load(tiny_directory)
    read = sum(len(by_hand(tokenizer, row["prompt"], row["completion"])[0]) - 1 for row in rows)
    assert (outcome.result.step, outcome.result.tokens) == (4, 2 * read)


def test_bug_5_accumulated_batches_weigh_by_their_targets(tiny_directory, tmp_path):
    """One update from batches of one row each is the update from all rows at once."""
    data = write(tmp_path / "data", train=completions(4))
    shared = {"iters": 1, "optimizer": "sgd", "learning_rate": 0.5, "method": "full", "clip_norm": None, "samples": 0}
    for name, more in (("whole", {"batch_size": 4}), ("parts", {"batch_size": 1, "grad_accumulation_steps": 4})):
        run(settings(tiny_directory, data, tmp_path / name, **shared, **more))
    whole, parts, start = saved(tmp_path / "whole"), saved(tmp_path / "parts"), saved(tiny_directory)
    for name, array in whole.items():
        change = np.abs(array - start[name]).max()
        assert change > 0, name
        assert np.abs(parts[name] - array).max() <= 1e-4 * change + 1e-7, name
    assert first_loss(tmp_path / "parts") == pytest.approx(first_loss(tmp_path / "whole"), rel=1e-5)


class StopAt(MetricsFile):
    """Sends this process a signal after its third step."""

    def on_metrics(self, metrics):
        """Write the metrics, then the signal."""
        super().on_metrics(metrics)
        if metrics["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("method", "rows"), [("lora", completions), ("prefix", labelled)], ids=["words", "labels"])
def test_bug_6_a_resumed_run_is_the_run_that_never_stopped(tiny_directory, tmp_path, method, rows):
    data = write(tmp_path / "data", train=rows(20), valid=rows(5, 1))
    shared = {"method": method, "iters": 6, "steps_per_eval": 2, "learning_rate": 0.01, "schedule": "cosine"}
    shared |= {"set": {"dropout": 0.1}} if method == "lora" else {}
    whole, _ = run(settings(tiny_directory, data, tmp_path / "whole", **shared))
    made = settings(tiny_directory, data, tmp_path / "cut", **shared)
    from mlxlm.training.finetune import finetune

    stopped = finetune(made, [StopAt(made.folder)], say=lambda text: None)
    assert (stopped.stopped, stopped.result.step) == (True, 3)
    assert not (made.folder / "adapter_config.json").exists()
    resumed, _ = run(made, resume=True)
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "cut"))
    assert resumed.before == whole.before
    assert (resumed.valid, resumed.rows) == (whole.valid, whole.rows)
    steps = [row["step"] for row in read_metrics(made.folder) if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_bug_7_all_of_a_fully_trained_model_is_saved(tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=completions(6))
    run(settings(tiny_directory, data, tmp_path / "out", method="full", learning_rate=0.01, samples=0))
    before, after = saved(tiny_directory), saved(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(not np.array_equal(after[name], before[name]) for name in after)
    names = " ".join(after)
    assert all(part in names for part in ("embed_tokens", "model.norm", "lm_head"))
    model, tokenizer = mlxlm.load(tmp_path / "out")
    assert tokenizer.encode("hi") == mlxlm.load(tiny_directory)[1].encode("hi")
    assert model.config == load_model(tiny_directory).config


def test_bug_8_unknown_keys_are_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown key 'lerning_rate'; did you mean 'learning_rate'") as error:
        FinetuneSettings.from_json({"model": "m", "data": "d", "lerning_rate": 1, "iter": 5})
    assert "unknown key 'iter'; did you mean 'iters'" in str(error.value)


@pytest.mark.parametrize("name", ["full", "lora", "dora", "ia3"])
def test_bug_9_the_fused_model_is_the_adapter(tiny_directory, tmp_path, name):
    data = write(tmp_path / "data", train=completions(6))
    run(settings(tiny_directory, data, tmp_path / "out", method=name, learning_rate=0.05, samples=0))
    tokens, bare = mx.array([[9, 12, 30, 8, 41]]), load_model(tiny_directory)
    if name == "full":
        assert np.abs(np.array(load_model(tmp_path / "out")(tokens)) - np.array(bare(tokens))).max() > 1e-3
        return
    model, tokenizer = mlxlm.load(tiny_directory, adapter=tmp_path / "out")
    expected = np.array(model(tokens))
    assert np.abs(expected - np.array(bare(tokens))).max() > 1e-3
    peft.merge(model)
    mlxlm.save(model, tokenizer, tmp_path / "fused")
    assert np.abs(np.array(load_model(tmp_path / "fused")(tokens)) - expected).max() < 2e-5


def test_bug_10_a_config_that_changes_the_maths_changes_the_loss_and_stays(tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=completions(4))
    losses, path = [], tiny_directory / "config.json"
    values = json.loads(path.read_text())
    plain = {
        name: value for name, value in values.items() if name not in ("rope_theta", "rope_scaling", "rope_parameters")
    }
    dialects = (
        {**plain, "rope_theta": 100.0}, {**plain, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {**plain, "rope_theta": 100.0, "hidden_act": "relu"},
    )  # fmt: skip
    for number, changed in enumerate(dialects):
        path.write_text(json.dumps(changed))
        run(settings(tiny_directory, data, tmp_path / str(number), **STILL, method="full"))
        losses.append(first_loss(tmp_path / str(number)))
        kept = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert load_model(tmp_path / str(number)).config == load_model(tiny_directory).config
        assert kept["hidden_act"] == changed["hidden_act"]
    assert losses[0] == losses[1]
    assert abs(losses[2] - losses[0]) > 1e-4
    path.write_text(json.dumps({**plain, "attention_sink_scale": 2}))
    with pytest.raises(ConfigError, match="attention_sink_scale"):
        run(settings(tiny_directory, data, tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_bug_11_no_class_is_patched_and_no_other_model_is_touched(tiny_directory, tmp_path):
    bystander, tokens = load_model(tiny_directory), mx.array([[9, 12, 30, 8, 41]])
    expected = np.array(bystander(tokens))
    calls = {kind: vars(kind).get("__call__") for kind in {type(module) for module in bystander.modules()}}
    trainable = {name for name, _ in tree_flatten(bystander.trainable_parameters())}
    data = write(tmp_path / "data", train=completions(4))
    run(settings(tiny_directory, data, tmp_path / "out", grad_checkpoint=True, learning_rate=0.1, samples=0))
    assert np.array_equal(np.array(bystander(tokens)), expected)
    assert all(vars(kind).get("__call__") is call for kind, call in calls.items())
    assert {name for name, _ in tree_flatten(bystander.trainable_parameters())} == trainable
    assert bystander.decoder._recomputed == 0
