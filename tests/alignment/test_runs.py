"""Runs of every method: what is learned, exact resume, the reference, what is saved."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from alignment_runs import pairs, prompts, settings_for, texts, write
from mlx.utils import tree_flatten

import mlxlm
from mlxlm import peft
from mlxlm.alignment import METHODS, prepare
from mlxlm.alignment import log_probabilities as log_p
from mlxlm.alignment.comparisons import comparisons
from mlxlm.alignment.log_probabilities import answer_log_probabilities, with_places
from mlxlm.alignment.reference import fingerprint, log_probabilities, reference, reference_log_probabilities
from mlxlm.alignment.rewards import score_answers
from mlxlm.data import Encoding, Example, Rows, pad_examples
from mlxlm.distributed import Joined, Mesh, connect
from mlxlm.errors import DataError, MlxlmError, UsageError
from mlxlm.training import MetricsFile, read_metrics
from mlxlm.training.reporters import Reporter

ALONE = Joined(connect(alone=True), Mesh())
EXAMPLES = [
    Example([5, 9, 13, 7], [False, False, True, True]),
    Example([8, 21, 3, 11, 30, 2], [False, False, False, False, True, True]),
    Example([4, 4], [False, True]),
]


def by_hand(model, example):
    """log p of an answer in float64, of one row alone."""
    logits = np.array(model(mx.array([example.tokens]))[0], dtype=np.float64)
    log_p = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return sum(log_p[i - 1, example.tokens[i]] for i in range(1, len(example.tokens)) if example.scored[i])


@pytest.mark.parametrize("target", ["query", "head.output"])
def test_log_probabilities_are_those_of_the_logits(tiny, target):
    model, _ = tiny
    if target == "query" or not model.config.head.tied:
        peft.apply(model, peft.Lora(rank=2, targets=(target,)))
    model.eval()
    wanted = [by_hand(model, example) for example in EXAMPLES]
    np.testing.assert_allclose(log_probabilities(model, EXAMPLES, 2), wanted, rtol=1e-5)


def test_the_gradient_of_log_probabilities_is_the_same_at_few_places_and_at_all(tiny):
    model, _ = tiny
    batch = pad_examples(EXAMPLES, 64)
    few = {name: mx.array(array) for name, array in with_places(batch).items()}
    everywhere = {**few, "places": mx.arange(few["targets"].size), "place_targets": few["targets"].reshape(-1)}

    def loss(parameters, arrays):
        model.update(parameters)
        return (answer_log_probabilities(model, arrays) * mx.array([1.0, -0.5, 2.0])).sum()

    one, two = (dict(tree_flatten(mx.grad(loss)(model.parameters(), arrays))) for arrays in (few, everywhere))
    assert few["places"].size < everywhere["places"].size
    for name in one:
        np.testing.assert_allclose(np.array(one[name]), np.array(two[name]), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("method", [peft.Lora(rank=2, targets=("head.output", "query")), peft.Full()], ids=str)
def test_gradients_of_log_probabilities_made_by_parts_are_those_of_the_whole_logits(tiny, method, monkeypatch):
    """A head with an adapter around it is called for a few places at a time, here three."""
    model, _ = tiny
    monkeypatch.setattr(log_p, "_PART_BYTES", 3 * 4 * model.config.head.vocab_size)
    monkeypatch.setattr(type(model.head), "projection", lambda *arguments: None)
    if model.config.head.tied and method != peft.Full():
        method = peft.Lora(rank=2)
    peft.apply(model, method)
    model.update(mlxlm_unflatten({name: array + 0.05 for name, array in tree_flatten(model.trainable_parameters())}))
    model.eval()
    batch = {name: mx.array(array) for name, array in with_places(pad_examples(EXAMPLES, 64)).items()}
    weights = mx.array([1.0, -0.5, 2.0])

    def by_parts(parameters):
        model.update(parameters)
        return (answer_log_probabilities(model, batch) * weights).sum()

    def whole(parameters):
        model.update(parameters)
        logits = model(batch["tokens"], key_lengths=batch["key_lengths"])
        targets = batch["targets"]
        found = mx.take_along_axis(logits, mx.maximum(targets, 0)[..., None], -1)[..., 0] - mx.logsumexp(logits, -1)
        return (mx.where(targets == -100, 0.0, found).sum(1) * weights).sum()

    trained = model.trainable_parameters()
    (one, first), (two, second) = (mx.value_and_grad(loss)(trained) for loss in (by_parts, whole))
    assert one.item() == pytest.approx(two.item(), rel=1e-6)
    first, second = dict(tree_flatten(first)), dict(tree_flatten(second))
    assert any(np.abs(np.array(array)).max() > 1e-3 for array in second.values())
    for name in second:
        np.testing.assert_allclose(np.array(first[name]), np.array(second[name]), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("method", [peft.Lora(rank=2), peft.Full(), peft.PrefixTuning(num_tokens=3)], ids=str)
def test_the_reference_is_the_model_before_training(tiny, method):
    model, _ = tiny
    before = log_probabilities(model, EXAMPLES, 3)
    peft.apply(model, method)
    trained = dict(tree_flatten(model.trainable_parameters()))
    model.update(mlxlm_unflatten({name: array + 0.1 for name, array in trained.items()}))
    changed = log_probabilities(model, EXAMPLES, 3)
    assert np.abs(changed - before).max() > 1e-3
    np.testing.assert_allclose(reference_log_probabilities(model, EXAMPLES, 3, ALONE), before, atol=1e-5)
    np.testing.assert_allclose(log_probabilities(model, EXAMPLES, 3), changed, atol=1e-6)
    assert dict(tree_flatten(model.trainable_parameters())).keys() == trained.keys()


def mlxlm_unflatten(values):
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(values.items()))


def test_the_reference_is_kept_on_disk_for_this_model_and_these_answers_alone(tiny, tmp_path, monkeypatch):
    model, _ = tiny
    peft.apply(model, peft.Lora(rank=2))
    first = reference_log_probabilities(model, EXAMPLES, 2, ALONE, tmp_path)
    (file,) = tmp_path.glob("reference-*.safetensors")
    monkeypatch.setattr("mlxlm.alignment.reference.log_probabilities", None)  # the second time nothing is computed
    assert reference_log_probabilities(model, EXAMPLES, 2, ALONE, tmp_path).tolist() == first.tolist()
    monkeypatch.undo()
    with reference(model):
        name = fingerprint(model, EXAMPLES)
        assert name in file.name
        assert fingerprint(model, EXAMPLES[:2]) != name
        weight = model.decoder.layers[0].feed_forward.down.weight
        model.decoder.layers[0].feed_forward.down.weight = weight + mx.zeros_like(weight).at[1, 2].add(1e-3)
        assert fingerprint(model, EXAMPLES) != name
        model.decoder.layers[0].feed_forward.down.weight = weight
    file.write_bytes(b"torn")
    assert reference_log_probabilities(model, EXAMPLES, 2, ALONE, tmp_path).tolist() == first.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_measures_and_saves(run, method, tiny_directory):
    # Hardly an answer ends within the few tokens, so dapo would learn from none.
    changed = {"fine_tune_type": "full"} if method in ("reward", "simpo") else {}
    changed |= {"overlong": "keep"} if method == "dapo" else {}
    outcome, folder, _ = run(method, **changed)
    assert (outcome.result.step, outcome.result.reason) == (4, "done")
    assert outcome.before.keys() == outcome.after.keys()
    wanted = {"reward", "kl", "length", "finished"} if METHODS[method].get("prompts_per_iteration") else {"loss"}
    assert wanted <= outcome.after.keys()
    if "kl" in outcome.after:
        assert outcome.before["kl"] == pytest.approx(0, abs=1e-5)
        assert outcome.after["kl"] != outcome.before["kl"]
    results = json.loads((folder / "results.json").read_text())
    assert results["method"] == method
    name = "config.json" if method in ("reward", "simpo") else "adapter_config.json"
    assert (folder / name).is_file()
    if method == "ppo":  # what is saved has no value head, and loads
        loaded, _ = mlxlm.load(tiny_directory, adapter=folder)
        assert "value_head" not in loaded


def test_pairs_are_told_apart_after_a_few_steps(run):
    outcome, *_ = run("dpo", iters=15, steps_per_eval=0, answers=0, learning_rate=5e-3)
    assert outcome.before["accuracy"] == 0.5
    assert outcome.before["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert outcome.after["accuracy"] == 1
    assert outcome.after["margin"] > 0.1


def test_rewards_rise_where_the_reward_is_a_pattern(run):
    changed = {"reward": "regex:e", "learning_rate": 2e-2, "iters": 12, "prompts_per_iteration": 3,
               "answers_per_prompt": 6, "batch_size": 18, "steps_per_eval": 0, "beta": 0.0}  # fmt: skip
    outcome, *_ = run("grpo", answers=24, rows={"train": prompts(8), "valid": prompts(24, 1)}, **changed)
    assert outcome.after["reward"] > outcome.before["reward"] + 0.25


class Stop(Reporter):
    """Ends the process's run as a signal would, after so many steps."""

    def __init__(self, after):
        self.after = after

    def on_metrics(self, metrics):
        if metrics["step"] == self.after:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("dpo", {}),
        # Stopped between two passes over the same answers: the answers that were drawn before must come back.
        ("grpo", {"passes": 2, "iters": 5, "kl_target": 0.5}),
        ("ppo", {"passes": 2, "iters": 5}),
    ],
    ids=["dpo", "grpo", "ppo"],
)
def test_a_resumed_run_is_the_run_that_did_not_stop(run, method, changed, tmp_path):
    changed = {"steps_per_eval": 0, **changed}
    whole, folder, _ = run(method, folder="whole", reporters=[MetricsFile(tmp_path / "whole")], **changed)
    stopped, other, _ = run(method, folder="parts", reporters=[Stop(3)], **changed)
    assert stopped.stopped
    assert stopped.result.step == 3
    resumed, *_ = run(method, folder="parts", reporters=[MetricsFile(tmp_path / "parts")], resume=True, **changed)
    assert resumed.result.step == whole.result.step
    one, two = (mx.load(str(next(at.glob("*.safetensors")))) for at in (folder, other))
    assert all(np.array_equal(np.array(one[name]), np.array(two[name])) for name in one)
    assert resumed.after == whole.after
    if method != "dpo":
        kept = [{k: row[k] for k in ("step", "reward", "kl", "beta")} for row in read_metrics(folder) if "beta" in row]
        again = [{k: row[k] for k in ("step", "reward", "kl", "beta")} for row in read_metrics(other) if "beta" in row]
        assert kept[-len(again) :] == again


def test_settings_of_a_resumed_run_must_be_the_same(run):
    run("dpo", reporters=[Stop(2)])
    with pytest.raises(UsageError, match=r"beta was 0\.1, is 0\.3"):
        run("dpo", resume=True, beta=0.3)


def test_training_goes_on_from_an_adapter_which_is_then_the_reference(run, tiny_directory, tmp_path):
    _, first, _ = run("dpo", folder="first")
    data = tmp_path / "data"
    settings = settings_for("dpo", tiny_directory, data, tmp_path / "second", resume_adapter_file=str(first))
    made = prepare(settings, say=lambda text: None)
    loaded, _ = mlxlm.load(tiny_directory, adapter=first)
    answer = made.source.examples[0].answers[0]
    np.testing.assert_allclose(made.source.examples[0].reference[0], by_hand(loaded, answer), rtol=1e-5)
    assert made.train().before["accuracy"] == 0.5


def test_a_reward_model_scores_answers_as_it_was_trained_to_read_them(run):
    ranked = [{"prompt": text, "ranked": [" a cat", " cats", " no dogs"]} for text in texts(8)]
    outcome, folder, _ = run(
        "reward", rows={"train": ranked, "valid": ranked[:4]}, fine_tune_type="full", iters=20, learning_rate=3e-3,
        steps_per_eval=0,
    )  # fmt: skip
    assert outcome.after["accuracy"] == 1
    assert 0 <= outcome.after["calibration_error"] < 0.5
    model, tokenizer = mlxlm.load(folder)
    scores = score_answers(model, tokenizer, [(ranked[0]["prompt"], one) for one in ranked[0]["ranked"]])
    assert scores == sorted(scores, reverse=True)
    example = tokenizer.encode_chat(
        [{"role": "user", "content": ranked[0]["prompt"]}, {"role": "assistant", "content": " a cat"}],
        add_generation_prompt=False,
    )
    assert model(mx.array([example]))[0, 0].item() == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parity
def test_transformers_loads_a_reward_model(run):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    _, folder, _ = run("reward", fine_tune_type="full")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.num_labels == 1
    mine, _ = mlxlm.load(folder)
    tokens = [5, 9, 13, 7, 21]
    with torch.no_grad():
        wanted = theirs(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(np.array(mine(mx.array([tokens]))), wanted, atol=1e-4)


def test_texts_are_learned_beside_with_ppo(run, tmp_path):
    file = write(tmp_path / "texts", train=[{"text": text} for text in texts(6)]) / "train.jsonl"
    outcome, *_ = run("ppo", ptx_data=str(file), ptx_weight=1.0, iters=2, steps_per_eval=0)
    assert outcome.result.loss > 1  # the mean loss of the texts, nearly alone


@pytest.mark.parametrize(
    ("method", "rows", "text"),
    [
        ("dpo", prompts(3), "learns from rows with prompt, chosen and rejected"),
        ("kto", pairs(3), "prompt, completion and label"),
        ("kto", [{"prompt": "a", "completion": "b", "label": 1}] * 3, "true or false"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}] * 3, "'margin' must be a number"),
        ("reward", [{"prompt": "a", "ranked": ["b"]}] * 3, "at least two answers"),
        ("grpo", [{"text": "a"}] * 3, "no 'prompt' to answer"),
    ],
)
def test_rows_that_a_method_cannot_learn_from_are_told(run, method, rows, text):
    with pytest.raises(DataError, match=text):
        run(method, rows={"train": rows})


def test_the_plan_of_memory_low_takes_one_comparison_at_a_time(tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=pairs(4), valid=pairs(2, 1))
    made = prepare(settings_for("dpo", tiny_directory, data, tmp_path / "out", memory="low"), say=lambda text: None)
    assert made.train_settings.accumulation == 3
    assert made.source.next()["tokens"].shape[0] == 2


@pytest.mark.parametrize("rewards", [False, True])
def test_rows_whose_answers_are_the_same_are_left_out_and_counted(tiny, rewards):
    _, tokenizer = tiny
    rows = [
        {"prompt": "a", "chosen": "cat", "rejected": "dog"},
        {"prompt": "b", "chosen": "cat", "rejected": "cat"},
        {"prompt": "c", "chosen": "cat and dog", "rejected": "cat and cow"},
    ]
    made, lost = read_comparisons(rows, tokenizer, rewards=rewards)
    assert (len(made), lost.same) == (2, 1)
    limit = len(made[1].answers[0].tokens) - 4  # what tells the answers apart is cut off
    made, lost = read_comparisons(rows, tokenizer, rewards=rewards, max_length=limit)
    assert (len(made), lost.same) == (1, 2)
    assert "2 rows left out, as answers of theirs are the same" in str(lost)
    with pytest.raises(DataError, match="1 rows left out"):
        read_comparisons(rows[1:2], tokenizer, rewards=rewards)


def read_comparisons(rows, tokenizer, *, rewards, max_length=200):
    kind = "preference"
    given = Rows("rows", kind, [(f"row {i}", row) for i, row in enumerate(rows)])
    return comparisons(given, tokenizer, Encoding(max_length=max_length, truncation="cut-right"), rewards=rewards)


def test_numbers_are_of_the_test_rows_and_the_best_weights_are_told_by_the_validation_rows(run):
    rows = {"train": pairs(8), "valid": pairs(4, 1), "test": pairs(3, 2)}
    outcome, folder, said = run("dpo", rows=rows, reporters=())
    assert outcome.measured_on == "test"
    assert json.loads((folder / "results.json").read_text())["measured_on"] == "test"
    measured = [text for text in said if text.startswith("measures")]
    assert measured == [
        f"measures 3 comparisons and 2 answers (test rows) {when} training" for when in ("before", "after")
    ]
    assert outcome.result.best_step is not None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss_chunk": 5}, "loss_chunk has no effect"),
        ({"fine_tune_type": "full", "format": "peft"}, "format is of adapters"),
        ({"resume_adapter_file": "nowhere"}, "expected an adapter's folder"),
        ({"set": {"rang": 4}}, "unknown key 'rang'"),
        ({"reward": "aritmetic"}, "expected arithmetic"),
        ({"beta": float("inf")}, "beta is inf; expected a finite number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_are_checked_before_anything_is_read(tmp_path, changes, text):
    with pytest.raises(MlxlmError, match=text):
        prepare(settings_for("dpo", tmp_path / "no-model", tmp_path / "no-data", tmp_path / "out", **changes))


def test_weights_beyond_the_target_of_divergence_are_not_the_best(run, monkeypatch):
    measured = iter([0.0, 4.0, 0.5, 0.5])  # before, two evaluations, after
    monkeypatch.setattr(
        "mlxlm.alignment.run.measure_answers",
        lambda *given: {"reward": min(kl := next(measured), 1.0), "kl": kl, "length": 1.0, "finished": 1.0},
    )
    outcome, *_ = run("grpo", kl_target=1.0)
    assert outcome.result.best_step == 4
