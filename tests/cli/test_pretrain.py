"""`mlxlm pretrain`: every example recipe in small, resuming, signals and refusals."""

from __future__ import annotations

import gc
import json
import os
import re
import runpy
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import mlxlm
from mlxlm import runtime
from mlxlm.training import recipe
from mlxlm.training.reporters import MetricsFile, read_metrics

EXAMPLES = Path(__file__).parents[2] / "examples"
SPECIAL = [
    "<pad>", "</s>", "[MASK]", "[CLS]", "[SEP]", "[sMASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>",
]  # fmt: skip
SENTINELS = [f"<extra_id_{number}>" for number in range(20)]
# What makes each example's model tiny.
SMALL = {
    "pretrain_stdlib": ["num_hidden_layers=1", "hidden_size=16", "intermediate_size=24", "head_dim=2"],
    "pretrain_gpt": ["n_layer=1", "n_embd=16"],
    "pretrain_bert": ["num_hidden_layers=1", "hidden_size=16", "intermediate_size=24"],
    "pretrain_t5": ["num_layers=1", "num_decoder_layers=1", "d_model=16", "d_kv=4", "d_ff=24"],
    "pretrain_glm": ["num_layers=1", "hidden_size=16"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with train.jsonl, valid.jsonl and a tokenizer that has the special tokens of every objective."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["def", "return", "value", "name", "path", "read.", "write", "None", "self."]
    texts = [" ".join(rng.choice(words, 90)) for _ in range(30)]
    for name, part in (("train", texts[:25]), ("valid", texts[25:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(texts, trainer)
    built.add_special_tokens(SENTINELS[::-1])  # the first sentinel is the last id
    (folder / "tokenizer").mkdir()
    built.save(str(folder / "tokenizer" / "tokenizer.json"))
    roles = {"eos": "</s>", "pad": "<pad>", "mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{f"{k}_token": v for k, v in roles.items()}}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def arguments(corpus, output, example="pretrain_gpt", steps=2, *more):
    """The command line of an example in small."""
    changes = [f"model.{one}" for one in SMALL[example]] + [
        f"tokenizer={corpus / 'tokenizer'}", f"data.train={corpus / 'train.jsonl'}",
        f"data.valid={corpus / 'valid.jsonl'}", f"data.cache={corpus / 'cache'}", "training.warmup_steps=1",
        "training.report_every=1", "training.evaluate_every=0", "training.dtype=float32", "data.processes=1",
    ]  # fmt: skip
    flags = [flag for change in changes for flag in ("--set", change)]
    flags += ["--output", output, "--steps", steps, "--batch-size", 3, "--max-seq-length", 32]
    return ["pretrain", "--config", EXAMPLES / example / "recipe.yaml", *flags, *more]


def weights(folder):
    """All weights of a saved model."""
    model, _ = mlxlm.load(folder)
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("example", SMALL)
def test_every_example_trains_and_its_model_loads_and_is_examined(
    mlxlm_command, corpus, tmp_path, example, monkeypatch, capsys
):
    status, out, err = mlxlm_command(*arguments(corpus, tmp_path / "run", example, 2))
    assert (status, out) == (0, ""), err
    rows = read_metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2
    assert any("perplexity" in row for row in rows)
    saved = recipe.read(tmp_path / "run" / "recipe.yaml")
    assert (saved["training"]["steps"], saved["data"]["batch_size"]) == (2, 3)
    expected = np.log(saved["model"]["vocab_size"])
    assert all(loss == pytest.approx(expected, rel=0.1) for loss in losses)  # drawn weights know nothing
    model, tokenizer = mlxlm.load(tmp_path / "run" / "model")
    assert model.config == recipe.check(saved).config
    assert tokenizer.encode("def name")
    assert tokenizer.eos_id == 1
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["eos_token_id"] == 1
    script = EXAMPLES / "what_it_learned.py"
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path / "run"), "--batches", "2", "--show", "1"])
    runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    assert re.search(
        r"^[\d,]+ hidden tokens: [\d.]+% found, .* most frequent: [\d.]+%; .* [\d.]+% found\nbefore .*\n.* -> ", shown
    )


def test_the_shipped_model_can_be_made_again(corpus, tmp_path, monkeypatch, capsys):
    """Trained in small by the recipe, quantized, measured; and a second call finds the run finished."""
    script = EXAMPLES / "pretrain_stdlib" / "ship.py"
    changes = arguments(corpus, tmp_path / "run", "pretrain_stdlib")
    changes = [text for text in changes if "=" in str(text) and "hidden_size" not in text and "head_dim" not in text]
    changes += [
        "model.hidden_size=64", "model.intermediate_size=64", "model.num_attention_heads=2", "training.steps=2",
        "model.num_key_value_heads=1", f"output={tmp_path / 'run'}", "data.batch_size=3", "data.max_length=32",
    ]  # fmt: skip
    flags = [flag for change in changes for flag in ("--set", str(change))]
    measured = []
    for _ in range(2):
        monkeypatch.setattr("sys.argv", [str(script), "--output", str(tmp_path / "shipped"), *flags])
        runpy.run_path(str(script), run_name="__main__")
        measured.append(json.loads((tmp_path / "shipped" / "measured.json").read_text()))
        assert "| 2 |" in capsys.readouterr().out
    config = json.loads((tmp_path / "shipped" / "config.json").read_text())
    assert (config["quantization"]["bits"], config["eos_token_id"]) == (8, 1)
    assert measured[0]["held_out_loss_quantized"] == pytest.approx(measured[0]["held_out_loss"], abs=0.02)
    assert measured[1]["held_out_loss"] == measured[0]["held_out_loss"]
    saved = recipe.read(tmp_path / "run" / "recipe.yaml")
    assert saved["objective"] == {"name": "causal", "document_mask": True}


def test_a_run_learns(mlxlm_command, corpus, tmp_path):
    status, _, err = mlxlm_command(
        *arguments(corpus, tmp_path, "pretrain_gpt", 40, "--learning-rate", "2e-2", "--set", "model.n_embd=32")
    )
    assert status == 0, err
    losses = [row["loss"] for row in read_metrics(tmp_path) if "loss" in row]
    assert losses[-1] < 4.0 < losses[0]


@pytest.mark.slow
@pytest.mark.skipif(runtime.backend() != "cpu", reason="GPUs run ahead, so peaks of small steps say nothing")
@pytest.mark.parametrize("example", SMALL)
def test_the_plan_of_every_example_is_within_15_percent_of_the_measured_peak(corpus, tmp_path, example):
    changes = [
        ("tokenizer", str(corpus / "tokenizer")), ("data.train", str(corpus / "train.jsonl")), ("data.valid", None),
        ("data.cache", str(corpus / "cache")), ("data.batch_size", 8), ("data.max_length", 64),
        ("training.dtype", "float32"), ("training.final_weights", "last"), ("output", str(tmp_path)),
    ]  # fmt: skip
    checked = recipe.check(recipe.override(recipe.read(EXAMPLES / example / "recipe.yaml"), changes))
    mx.clear_cache()
    gc.collect()
    before = mx.get_active_memory()
    trainer = checked.trainer()
    limit = mx.set_memory_limit(1)  # MLX waits for each operation
    try:
        for _ in range(2):
            mx.reset_peak_memory()
            outcome = trainer.step([trainer.source.next()], 1e-4)
            mx.eval(outcome.loss)
            trainer.step.evaluate_state()
    finally:
        mx.set_memory_limit(limit)
    predicted = recipe.plans.predict(checked.config, checked.plan_settings()).peak
    assert predicted == pytest.approx(mx.get_peak_memory() - before, rel=0.15)


class StopAt(MetricsFile):
    """Sends this process a signal after a step."""

    number = signal.SIGINT

    def on_metrics(self, metrics):
        """Write the metrics, then the signal."""
        super().on_metrics(metrics)
        if metrics["step"] == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_a_signal_saves_and_the_resumed_run_ends_as_the_whole_one(
    mlxlm_command, corpus, tmp_path, monkeypatch, number, expected
):
    assert mlxlm_command(*arguments(corpus, tmp_path / "whole", "pretrain_gpt", 4))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(StopAt, "number", number)
        patch.setattr("mlxlm.training.MetricsFile", StopAt)
        status, _, err = mlxlm_command(*arguments(corpus, tmp_path / "cut", "pretrain_gpt", 4))
    assert status == expected
    assert "--resume" in err
    assert not (tmp_path / "cut" / "model").exists()
    status, _, err = mlxlm_command("pretrain", "--resume", "--output", tmp_path / "cut")
    assert status == 0, err
    whole, cut = weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model")
    assert whole.keys() == cut.keys()
    assert all(mx.array_equal(whole[name], cut[name]) for name in whole)


def test_a_finished_run_is_not_overwritten_nor_continued_as_another(mlxlm_command, corpus, tmp_path):
    first = arguments(corpus, tmp_path, "pretrain_gpt", 1)
    assert mlxlm_command(*first)[0] == 0
    before = (tmp_path / "recipe.yaml").read_bytes()
    status, _, err = mlxlm_command(*first, "--seed", 5)
    assert (status, "--resume" in err) == (2, True)
    status, _, err = mlxlm_command(*first, "--seed", 5, "--resume")
    assert (status, "training.seed was 0, is 5" in err) == (2, True)
    assert (tmp_path / "recipe.yaml").read_bytes() == before


def test_a_run_goes_on_that_began_before_a_setting_existed_and_not_from_damaged_files(mlxlm_command, corpus, tmp_path):
    first = arguments(corpus, tmp_path, "pretrain_gpt", 1)
    assert mlxlm_command(*first)[0] == 0
    saved = tmp_path / "recipe.yaml"
    older = re.sub(r"\n  (best_by|val_batches|patience): .*", "", saved.read_text())
    assert older.count("\n") == saved.read_text().count("\n") - 3
    saved.write_text(older)
    assert mlxlm_command(*first, "--resume")[0] == 0
    assert "val_batches: 100" in saved.read_text()
    (tmp_path / "checkpoints" / "step-00000001" / "optimizer.safetensors").write_bytes(b"")
    status, _, err = mlxlm_command("pretrain", "--resume", "--output", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "optimizer.safetensors is damaged: it has 0 bytes" in err
    assert "--output" in err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--set", "training.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["--set", "model.vocab_size=20"], "set model.vocab_size to"),
        (["--set", "training.steps"], "NAME=VALUE"),
        (["--report-to", "tensorbored"], "did you mean 'tensorboard'"),
        (["--memory", "sometimes"], "memory is 'sometimes'"),
        (["--set", "tokenizer=/nowhere/at/all"], "/nowhere/at/all"),
        (["--set", "data.train=/nowhere/at/all.txt"], "no such file"),
    ],
    ids=["unknown-key", "vocabulary", "set", "report-to", "memory", "tokenizer", "data"],
)
def test_mistakes_are_one_line(mlxlm_command, corpus, tmp_path, more, text):
    status, _, err = mlxlm_command(*arguments(corpus, tmp_path / "run", "pretrain_gpt", 1, *more))
    assert status == 2
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_reports_to_tensorboard(mlxlm_command, corpus, tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    status, _, err = mlxlm_command(*arguments(corpus, tmp_path, "pretrain_gpt", 2, "--report-to", "tensorboard"))
    assert status == 0, err
    assert recipe.read(tmp_path / "recipe.yaml")["report_to"] == ["tensorboard"]
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


def test_a_recipe_is_needed(mlxlm_command):
    status, _, err = mlxlm_command("pretrain")
    assert (status, "--config" in err) == (2, True)
