"""`mlxlm finetune`: every method and every kind of row, what comes out works with the other commands, and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import mlxlm
from mlxlm import peft
from mlxlm.cli import finetune as command
from mlxlm.cli.finetune_flags import FLAGS
from mlxlm.models import SequenceHeadSpec, load_model
from mlxlm.training import MetricsFile, read_metrics
from mlxlm.training.finetune import METHOD_PRESETS, FinetuneSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from finetune_runs import completions, labelled, sentences, tagged, write

QUICK = ["--iters", 2, "--batch-size", 3, "--steps-per-report", 1, "--samples", 1, "--sample-tokens", 3]
QUICK += ["--exact-match", 2, "--steps-per-eval", 0]
SWITCHES = {flag.names[0].split("/")[0] for flag in FLAGS if flag.type is bool}
PAIRS = [{"source": text, "target": text.split()[0]} for text in sentences(8)]


def arguments(model, data, output, *more):
    return ["finetune", "--model", model, "--data", data, "--adapter-path", output, *QUICK, *more]


@pytest.mark.parametrize("method", [name for name in peft.METHODS if name != "bitfit"])
def test_a_decoder_learns_words_by_every_method_and_generate_uses_it(mlxlm_command, tiny_directory, tmp_path, method):
    data, output = write(tmp_path / "data", train=completions(8), valid=completions(3, 1)), tmp_path / "out"
    more = ["--method", method, *(["--num-layers", 1] if method == "last-layers" else [])]
    if method == "qlora":
        more += ["--set", "targets=feed_forward.down"]
    status, out, err = mlxlm_command(*arguments(tiny_directory, data, output, *more))
    if method == "qlora":  # the fixture's layers are too narrow for groups of weights
        assert (status, "QLoRA needs quantized weights" in err) == (2, True)
        return
    assert status == 0, err
    for text in ("perplexity", "before", "after", "peak memory", "trained"):
        assert text in out
    where = ["--model", output] if method == "full" else ["--model", tiny_directory, "--adapter-path", output]
    status, _, err = mlxlm_command("generate", *where, "--prompt", "the cat", "--max-tokens", 4)
    assert status == 0, err
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] == 2
    assert results["valid"]["loss"] > 0
    assert 0 < results["trainable"] <= results["parameters"]


@pytest.mark.parametrize("base", ["tiny_directory", "tiny_bert_directory"])
@pytest.mark.parametrize("method", ["full", "lora", "p-tuning-v2", "houlsby", "prompt", "last-layers", "bitfit"])
def test_a_head_is_joined_for_labels_and_classify_uses_it(mlxlm_command, request, tmp_path, method, base):
    model = request.getfixturevalue(base)
    if method == "bitfit" and base == "tiny_directory":
        pytest.skip("this model has no biases")
    rows = {"train": labelled(8), "valid": labelled(4, 1), "test": labelled(4, 2)}
    data, output = write(tmp_path / "data", **rows), tmp_path / "out"
    more = ["--method", method, *(["--num-layers", 1] if method == "last-layers" else [])]
    status, out, err = mlxlm_command(*arguments(model, data, output, *more))
    assert status == 0, err
    assert "macro f1" in out
    assert "mlxlm classify" in out
    where = ["--model", output] if method == "full" else ["--model", model, "--adapter-path", output]
    texts = [row["text"] for row in rows["test"]]
    status, found, err = mlxlm_command("classify", *where, *texts)
    assert status == 0, err
    labels = [line.split("\t")[0] for line in found.splitlines()]
    right = [row["label"] for row in rows["test"]]
    accuracy = np.mean([one == other for one, other in zip(labels, right, strict=True)])
    assert json.loads((output / "results.json").read_text())["test"]["accuracy"] == pytest.approx(accuracy)
    if method == "full":
        assert json.loads((output / "config.json").read_text())["id2label"] == {"0": "cat", "1": "none"}
    else:
        assert json.loads((output / "labels.json").read_text())["id2label"] == {"0": "cat", "1": "none"}


@pytest.mark.parametrize("base", ["tiny_directory", "tiny_bert_directory"])
def test_words_are_tagged_by_decoders_and_encoders(mlxlm_command, request, tmp_path, base):
    model = request.getfixturevalue(base)
    data = write(tmp_path / "data", train=tagged(8), valid=tagged(3, 1))
    status, out, err = mlxlm_command(*arguments(model, data, tmp_path / "out", "--learning-rate", 0.01))
    assert status == 0, err
    assert "entity f1" in out
    status, found, _ = mlxlm_command("classify", "--model", model, "--adapter-path", tmp_path / "out", "the cat sat")
    assert (status, [pair.split("/")[0] for pair in found.split()]) == (0, ["the", "cat", "sat"])


@pytest.mark.parametrize("rows", [PAIRS, labelled(8)], ids=["pairs", "labels"])
def test_an_encoder_decoder_writes_targets_and_labels(mlxlm_command, tiny_seq2seq_directory, tmp_path, rows):
    data = write(tmp_path / "data", train=rows, valid=rows[:3])
    status, out, err = mlxlm_command(*arguments(tiny_seq2seq_directory, data, tmp_path / "out"))
    assert status == 0, err
    assert "perplexity" in out
    assert ("writes the label" in err) == ("label" in rows[0])
    where = ["--model", tiny_seq2seq_directory, "--adapter-path", tmp_path / "out"]
    assert mlxlm_command("generate", *where, "--prompt", "the cat", "--max-tokens", 3)[0] == 0


def test_every_flag_is_a_setting_and_arrives(mlxlm_command, monkeypatch, tmp_path):
    """Bug 4 of the field: a flag that the program took and never used."""
    fields = {field.name for field in dataclasses.fields(FinetuneSettings)}
    assert {flag.setting for flag in FLAGS} | {"model", "adapter_path"} == fields | {"mask_prompt"}
    seen = {}
    monkeypatch.setattr(command, "_run", lambda given, config, resume, group: seen.update(given) or sys.exit(0))
    values = {int: "3", float: "0.25", str: "x"}
    line = [word for flag in FLAGS for word in (flag.names[0].split("/")[0], values.get(flag.type, "x"))]
    line = [word for word, before in zip(line, ["", *line], strict=False) if not (before in SWITCHES and word == "x")]
    status, _, err = mlxlm_command("finetune", *line)
    assert status == 0, err
    arrived = {int: 3, float: 0.25, str: "x", bool: True}
    assert seen == {flag.setting: arrived.get(flag.type, ["x"]) for flag in FLAGS}


def test_settings_reach_the_trainer(tiny_directory, tmp_path):
    """The other half of bug 4: what arrives in the settings is what the trainer has."""
    from mlxlm.training.finetune import prepare

    data = write(tmp_path / "data", train=completions(8), valid=completions(3, 1))
    wanted = {
        "iters": 7, "grad_accumulation_steps": 3, "optimizer": "lion", "learning_rate": 0.25, "schedule": "linear",
        "warmup_steps": 2, "weight_decay": 0.125, "clip_norm": 0.5, "label_smoothing": 0.0625, "ema_decay": 0.75,
        "recompute_layers": 1, "cache_limit": 1000, "seed": 5, "steps_per_eval": 4, "save_every": 6,
        "steps_per_report": 9, "patience": 8,
    }  # fmt: skip
    made = FinetuneSettings(model=str(tiny_directory), data=str(data), adapter_path=str(tmp_path / "out"), **wanted)
    given = prepare(made, say=lambda text: None).train_settings.to_json()
    names = {
        "iters": "steps", "grad_accumulation_steps": "accumulation", "steps_per_eval": "evaluate_every",
        "steps_per_report": "report_every",
    }  # fmt: skip
    assert {name: given[names.get(name, name)] for name in wanted} == wanted


def test_a_file_has_the_same_names_and_flags_win(mlxlm_command, tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=completions(8))
    values = {
        "model": str(tiny_directory), "data": str(data), "fine_tune_type": "lora", "iters": 9, "batch-size": 2,
        "lora_parameters": {"rank": 4, "scale": 3.0, "keys": ["self_attn.q_proj"]}, "mask_prompt": True, "samples": 0,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    status, _, err = mlxlm_command(
        "finetune", "--config", tmp_path / "run.yaml", "--iters", 1, "--adapter-path", tmp_path / "out"
    )
    assert status == 0, err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 12, ["q_proj"])
    kept = yaml.safe_load((tmp_path / "out" / "finetune.yaml").read_text())
    assert (kept["iters"], kept["batch_size"], kept["loss_on"]) == (1, 2, "completion")


@pytest.mark.parametrize("layout", ["peft", "mlx", "mlxlm"])
def test_the_adapter_is_written_in_the_format_asked_for(mlxlm_command, tiny_directory, tmp_path, layout):
    data = write(tmp_path / "data", train=completions(6))
    more = ["--format", layout, "--learning-rate", 0.1]
    assert mlxlm_command(*arguments(tiny_directory, data, tmp_path / "out", *more))[0] == 0
    names = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors", "mlxlm": "adapter.safetensors"}
    assert (tmp_path / "out" / names[layout]).is_file()
    where = ["--model", tiny_directory, "--adapter-path", tmp_path / "out"]
    status, _, err = mlxlm_command("fuse", *where, "--save-path", tmp_path / "fused")
    assert status == 0, err
    begun = ["--resume-adapter-file", tmp_path / "out" / names[layout], "--iters", 1, "--samples", 0]
    status, _, err = mlxlm_command(*arguments(tiny_directory, data, tmp_path / "next", *begun))
    assert status == 0, err
    first = next(row["loss"] for row in read_metrics(tmp_path / "next") if "loss" in row)
    start = next(row["loss"] for row in read_metrics(tmp_path / "out") if "loss" in row)
    assert first < start


def test_answers_are_shown_while_training_and_compared_at_the_end(mlxlm_command, tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=completions(8), test=[{"prompt": "the mat", "completion": "the"}])
    status, out, err = mlxlm_command(*arguments(tiny_directory, data, tmp_path / "out", "--valid-fraction", 0))
    assert (status, "the mat" in out) == (0, True)
    data = write(tmp_path / "data", train=completions(12), valid=completions(2, 3))
    status, _, err = mlxlm_command(*arguments(tiny_directory, data, tmp_path / "more", "--steps-per-eval", 1))
    assert status == 0, err
    kept = [json.loads(line) for line in (tmp_path / "more" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [1, 2]
    assert "the mat" in next(iter(kept[0]["answers"]))
    assert " -> " in err


def test_the_best_weights_are_kept_and_a_run_without_progress_ends(mlxlm_command, tiny_directory, tmp_path):
    rows = completions(10)
    data = write(tmp_path / "data", train=rows, valid=[{"prompt": r["prompt"], "completion": "zz"} for r in rows[:4]])
    more = ["--iters", 30, "--steps-per-eval", 1, "--patience", 2, "--learning-rate", 0.2, "--method", "full"]
    more += ["--schedule", "constant", "--warmup-steps", 0, "--samples", 0]
    status, out, err = mlxlm_command(*arguments(tiny_directory, data, tmp_path / "out", *more))
    assert status == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["reason"] == "early"
    losses = [row["valid_loss"] for row in read_metrics(tmp_path / "out") if "valid_loss" in row]
    assert results["valid"]["loss"] == pytest.approx(min(losses), rel=1e-5)
    assert losses[-1] > min(losses)
    assert "stopped early" in out


@pytest.mark.parametrize("memory", ["auto", "low", "off"])
def test_memory_presets_keep_the_rows_of_an_update(mlxlm_command, tiny_directory, tmp_path, memory):
    data = write(tmp_path / "data", train=completions(8))
    more = ["--memory", memory, "--batch-size", 4]
    status, _, err = mlxlm_command(*arguments(tiny_directory, data, tmp_path / "out", *more))
    assert status == 0, err
    kept = yaml.safe_load((tmp_path / "out" / "finetune.yaml").read_text())
    assert kept["batch_size"] * kept["grad_accumulation_steps"] == 4
    assert kept["batch_size"] == (1 if memory == "low" else 4)
    assert kept["recompute_layers"] == (-1 if memory == "low" else 0)


class Stop(MetricsFile):
    """Sends this process a signal after its first step."""

    def on_metrics(self, metrics):
        """Write the metrics, then the signal."""
        super().on_metrics(metrics)
        if metrics["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_saves_and_resume_needs_nothing_but_the_folder(mlxlm_command, tiny_directory, tmp_path, monkeypatch):
    data, output = write(tmp_path / "data", train=completions(12)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("mlxlm.training.MetricsFile", Stop)
        status, out, err = mlxlm_command(*arguments(tiny_directory, data, output))
    assert (status, out) == (143, "")
    assert f"mlxlm finetune --resume --adapter-path {output}" in err
    status, out, err = mlxlm_command("finetune", "--resume", "--adapter-path", output)
    assert status == 0, err
    assert (output / "adapter_config.json").is_file()
    refused = (
        (["--resume", "--seed", 4], "seed was 0, is 4"), (["--resume", "--samples", 0], "samples was 1, is 0"),
        ([], "--resume it, or choose another"),
    )  # fmt: skip
    for more, text in refused:
        status, _, err = mlxlm_command(*arguments(tiny_directory, data, output, *more))
        assert (status, text in err) == (2, True)
    with open(data / "train.jsonl", "a") as file:
        file.write(json.dumps(completions(1, 9)[0]) + "\n")
    status, _, err = mlxlm_command("finetune", "--resume", "--adapter-path", output)
    assert (status, "other data" in err) == (2, True)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--set", "rang=4"], "unknown key 'rang'; did you mean 'rank'"),
        (["--method", "ia3", "--rank", 4], "ia3: unknown key 'rank'"),
        (["--targets", "querry"], "no layer of this model is called 'querry'"),
        (["--method", "full", "--num-layers", 2], "use last-layers"),
        (["--epochs", 3], "iters and epochs are both given"),
        (["--format", "adapters"], "bottleneck"),
        (["--data", "/nowhere/at/all"], "is no file and no folder"),
        (["--truncation", "error", "--max-seq-length", 4], "tokens are more than the 4 allowed"),
        (["--test"], "no test rows"),
        (["--batch-size", 0], "batch_size is 0; expected at least 1"),
        (["--mask-prompt", "--loss-on", "all"], "mask_prompt says loss_on"),
        (["--schedule", "cosin"], "did you mean 'cosine'"),
        (["--dtype", "float33"], "float33"),
        (["--report-to", "tensorbord"], "did you mean 'tensorboard'"),
        (["--patience", 2, "--valid-fraction", 0], "patience needs validation"),
        (["--best-by", "accuracy"], "best_by is 'accuracy', which is measured of labels"),
        (["--best-by", "f2"], "unknown best_by 'f2'; valid: accuracy, f1, loss"),
        (["--chat-template-config", "x"], "--chat-template-config is a JSON object"),
        (["--columns", "completion=respons"], "no column 'respons' to take for 'completion'"),
        (["--columns", "completin=prompt"], "no format has 'completin'; did you mean 'completion'"),
        (["--columns", "prompt"], "--columns is NAME=COLUMN"),
        (["--warmup-steps", 3], "warmup_steps is 3; expected 0 to 2, the steps of the run"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(mlxlm_command, tiny_directory, tmp_path, more, text):
    data, output = write(tmp_path / "data", train=completions(12)), tmp_path / "out"
    status, out, err = mlxlm_command(*arguments(tiny_directory, data, output, *more))
    assert (status, out) == (2, "")
    assert text in err
    assert err.splitlines()[-1].startswith("error: ")
    assert not output.exists()


@pytest.mark.parametrize(
    ("base", "rows", "text"),
    [
        ("tiny_bert_directory", completions(8), "an encoder learns labels"),
        ("tiny_directory", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8, "preference"),
        ("tiny_directory", [{"text": "a", "label": "x"}] * 8, "nothing to tell apart"),
        ("tiny_seq2seq_directory", [{"text": "a cat"}] * 8, "source and target"),
        ("tiny_directory", [{"txt": "a"}] * 8, "did you mean 'text'"),
        (
            "tiny_directory",
            [{"question": "a", "reply": "b"}] * 8,
            "did you mean {prompt, completion}? Say so with --columns prompt=question --columns completion=reply",
        ),
        ("tiny_directory", [{"prompt": "a", "response": "b"}] * 8, "--columns completion=response"),
    ],
    ids=["encoder", "preference", "one-label", "text", "keys", "other-keys", "one-other-key"],
)
def test_rows_that_a_model_cannot_learn_are_told(mlxlm_command, request, tmp_path, base, rows, text):
    data = write(tmp_path / "data", train=rows)
    status, _, err = mlxlm_command(*arguments(request.getfixturevalue(base), data, tmp_path / "out"))
    assert (status, text in err) == (2, True), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "rows", "loss_on", "text"),
    [
        ("tiny_directory", labelled(8), "completion", "no effect on labels"),
        ("tiny_seq2seq_directory", PAIRS, "all", "no effect on an encoder-decoder"),
        ("tiny_directory", [{"text": text} for text in sentences(8)], "completion", "no effect on rows of text alone"),
    ],
    ids=["labels", "pairs", "text"],
)
def test_what_to_learn_is_refused_where_it_has_no_effect(mlxlm_command, request, tmp_path, base, rows, loss_on, text):
    data = write(tmp_path / "data", train=rows)
    for more, why in ((["--loss-on", loss_on], text), (["--chat-template-config", '{"a": 1}'], "rows need none")):
        status, _, err = mlxlm_command(*arguments(request.getfixturevalue(base), data, tmp_path / "out", *more))
        assert (status, why in err) == (2, True), err


def test_columns_are_renamed_and_what_is_passed_over_is_said(mlxlm_command, tiny_directory, tmp_path):
    rows = [{"instruction": row["prompt"], "output": row["completion"]} for row in completions(12)]
    data = write(tmp_path / "data", train=rows)
    more = ["--columns", "prompt=instruction", "--columns", "completion=output", "--samples", 0]
    status, _, err = mlxlm_command(*arguments(tiny_directory, data, tmp_path / "out", *more))
    assert status == 0, err
    assert "completion rows: train 11, valid 1" in err
    data = write(tmp_path / "other", train=[{"text": row["text"], "category": row["label"]} for row in labelled(8)])
    status, _, err = mlxlm_command(*arguments(tiny_directory, data, tmp_path / "words", "--samples", 0))
    assert status == 0, err
    assert "rows are taken for text, without category; did you mean {text, label}? Say so with --columns" in err


def test_the_paragraphs_of_a_text_file_are_rows(mlxlm_command, tiny_directory, tmp_path):
    text = "# A title\n\nthe cat\nsat on a mat\n\n\n" + "\n\n".join(sentences(9)) + "\n"
    (tmp_path / "notes.md").write_text(text)
    data = tmp_path / "notes.md"
    status, _, err = mlxlm_command(*arguments(tiny_directory, data, tmp_path / "out", "--samples", 0))
    assert status == 0, err
    assert "text rows: train 10, valid 1" in err


def test_the_best_weights_may_be_those_of_the_best_f1(mlxlm_command, tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=labelled(24), valid=labelled(9, 1))
    more = ["--best-by", "f1", "--steps-per-eval", 1, "--iters", 8, "--learning-rate", 0.1, "--samples", 0]
    status, _, err = mlxlm_command(*arguments(tiny_directory, data, tmp_path / "out", *more))
    assert status == 0, err
    rows = [row for row in read_metrics(tmp_path / "out") if "macro_f1" in row]
    best = min(rows, key=lambda row: (-row["macro_f1"], row["valid_loss"]))
    assert len({row["macro_f1"] for row in rows}) > 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["best_step"] == best["step"]
    assert results["valid"]["macro_f1"] == pytest.approx(best["macro_f1"])
    assert "whose macro f1 was highest" in err


def test_f1_is_that_of_entities_where_there_are_any(tiny_directory, tmp_path):
    from mlxlm.training.finetune import prepare

    plain = [{"tokens": ["on", "a", "mat"], "labels": ["O", "O", "O"]}]
    for name, valid, measure in (("tags", tagged(3, 1), "entity_f1"), ("none", plain, "macro_f1")):
        data = write(tmp_path / name, train=tagged(8), valid=valid)
        made = FinetuneSettings(
            model=str(tiny_directory), data=str(data), best_by="f1", adapter_path=str(tmp_path / "x")
        )
        assert prepare(made, say=lambda text: None).train_settings.best_by == measure


def test_a_short_run_is_evaluated_every_ten_steps(tiny_directory, tmp_path):
    from mlxlm.training.finetune import prepare

    data = write(tmp_path / "data", train=completions(8), valid=completions(3, 1))
    for steps, every in ((4, 4), (30, 10), (300, 30)):
        made = FinetuneSettings(
            model=str(tiny_directory), data=str(data), iters=steps, adapter_path=str(tmp_path / "x")
        )
        assert prepare(made, say=lambda text: None).train_settings.evaluate_every == every


def test_variables_reach_the_chat_template(tiny_directory, tmp_path):
    from mlxlm.training.finetune import prepare

    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    data = write(tmp_path / "data", train=[{"messages": turns}] * 4)
    source = "{% for m in messages %}{{ mark }}{{ m.content }}{% endfor %}"
    made = FinetuneSettings(
        model=str(tiny_directory), data=str(data), adapter_path=str(tmp_path / "x"), loss_on="all",
        chat_template_config={"chat_template": source, "mark": "wow"},
    )  # fmt: skip
    run = prepare(made, say=lambda text: None)
    assert run.tokenizer.decode(run.examples.splits["train"][0].tokens).replace(" ", "").startswith("wowhiwowyo")


def test_short_rows_are_hardly_padded_where_no_step_is_compiled(tiny_directory, tmp_path):
    from mlxlm import runtime
    from mlxlm.training.finetune import prepare

    data = write(tmp_path / "data", train=labelled(9), valid=labelled(3, 1))
    made = FinetuneSettings(model=str(tiny_directory), data=str(data), batch_size=4, adapter_path=str(tmp_path / "x"))
    examples = prepare(made, say=lambda text: None).examples
    for source in (examples.source(made), examples.measuring("valid", made)()):
        batch = source.next()
        room = batch["tokens"].shape[1] - batch["key_lengths"].max()
        assert 0 <= room < (8 if runtime.backend() == "cpu" else 32)


def test_an_existing_result_is_not_overwritten(mlxlm_command, tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=completions(6))
    status, _, err = mlxlm_command(*arguments(tiny_directory, data, tiny_directory, "--method", "full"))
    assert (status, "holds a config.json already" in err) == (2, True)
    status, _, err = mlxlm_command("finetune", "--resume", "--adapter-path", tmp_path / "none")
    assert (status, "holds no run to resume" in err) == (2, True)
    status, _, err = mlxlm_command("finetune")
    assert (status, "--data is needed" in err) == (2, True)


def test_a_classifier_keeps_its_head_where_the_labels_are_its_own(mlxlm_command, tiny_directory, tmp_path):
    data = write(tmp_path / "data", train=labelled(8))
    assert mlxlm_command(*arguments(tiny_directory, data, tmp_path / "first", "--method", "full"))[0] == 0
    more = ["--learning-rate", 1e-12, "--iters", 1]
    assert mlxlm_command(*arguments(tmp_path / "first", data, tmp_path / "second", *more))[0] == 0
    first = load_model(tmp_path / "first")
    second, _ = mlxlm.load(tmp_path / "first", adapter=tmp_path / "second")
    assert isinstance(second.config.head, SequenceHeadSpec)
    assert np.allclose(np.array(first.head.output.weight), np.array(second.head.output.weight), atol=1e-6)


def test_every_method_has_a_preset():
    assert METHOD_PRESETS.keys() == peft.METHODS.keys()
