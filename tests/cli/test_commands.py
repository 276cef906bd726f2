"""The command line: results on stdout, the rest on stderr, one line and status 2 for a mistake."""

from __future__ import annotations

import importlib.abc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlxlm


def test_generate_prints_the_answer_and_reports_on_stderr(mlxlm_command, tiny_directory):
    status, out, err = mlxlm_command("generate", "--model", tiny_directory, "--prompt", "hi", "--max-tokens", 9)
    model, tokenizer = mlxlm.load(tiny_directory)
    expected = mlxlm.generate(model, tokenizer, [{"role": "user", "content": "hi"}], max_tokens=9)
    assert (status, out) == (0, expected + "\n")
    assert "tokens/s" in err
    assert "peak memory" in err


def test_generate_without_the_chat_template_continues_the_text(mlxlm_command, tiny_directory):
    arguments = ["generate", "--model", tiny_directory, "--max-tokens", 9, "--ignore-chat-template", "--prompt"]
    status, out, _ = mlxlm_command(*arguments, "hi")
    model, tokenizer = mlxlm.load(tiny_directory)
    assert (status, out) == (0, mlxlm.generate(model, tokenizer, "hi", max_tokens=9) + "\n")
    assert mlxlm_command(*arguments, "-", stdin="hi")[1] == out


def test_a_seed_repeats_a_sampled_answer(mlxlm_command, tiny_directory):
    arguments = ["generate", "--model", tiny_directory, "--prompt", "hi", "--temp", 1.5, "--seed"]
    assert mlxlm_command(*arguments, 3)[1] == mlxlm_command(*arguments, 3)[1]
    assert mlxlm_command(*arguments, 3)[1] != mlxlm_command(*arguments, 4)[1]


def test_chat_answers_each_line_and_obeys_commands(mlxlm_command, tiny_directory):
    lines = "hi\n\n/reset\nhi\n/nonsense\n/exit\nnever read\n"
    status, out, err = mlxlm_command("chat", "--model", tiny_directory, "--max-tokens", 5, stdin=lines)
    answers = out.rstrip("\n").split("\n")
    assert status == 0
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert "the conversation is forgotten" in err
    assert "unknown command /nonsense" in err


def test_chat_goes_on_after_a_turn_that_does_not_fit(mlxlm_command, tiny_directory):
    lines = "x" * 80 + "\nhi\n"
    status, out, err = mlxlm_command("chat", "--model", tiny_directory, "--max-tokens", 5, stdin=lines)
    assert status == 0
    assert "context is 64" in err
    assert out.strip()


def test_embed_writes_rows_in_order_with_their_own_fields(mlxlm_command, tiny_bert_directory, tmp_path):
    rows = [{"text": "the thing is", "id": 1}, {"text": "a", "id": 2}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    status, out, err = mlxlm_command("embed", "--model", tiny_bert_directory, "--input", source, "--output", target)
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert (status, out) == (0, "")
    assert "2 texts" in err
    assert [{key: row[key] for key in ("text", "id")} for row in written] == rows
    assert [len(row["embedding"]) for row in written] == [30, 30]
    _, out, _ = mlxlm_command("embed", "--model", tiny_bert_directory, "the thing is", "a")
    assert [json.loads(line)["embedding"] for line in out.splitlines()] == [row["embedding"] for row in written]


def test_a_bad_row_leaves_the_old_output_alone(mlxlm_command, tiny_bert_directory, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    target.write_text("old")
    source.write_text('{"text": "a"}\n{"text": "b"\n')
    status, _, err = mlxlm_command("embed", "--model", tiny_bert_directory, "-i", source, "-o", target)
    assert status == 2
    assert "in.jsonl, line 2: not valid JSON" in err
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["in.jsonl", "out.jsonl"]
    assert not list(tmp_path.glob(".out*"))


def test_fill_mask_prints_score_word_and_text(mlxlm_command, tiny_bert_directory):
    status, out, _ = mlxlm_command("fill-mask", "--model", tiny_bert_directory, "the [MASK] is", "--top-k", 3)
    rows = [line.split("\t") for line in out.splitlines()]
    assert status == 0
    assert [len(row) for row in rows] == [3, 3, 3]
    assert [float(row[0]) for row in rows] == sorted((float(row[0]) for row in rows), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "{tiny}", "--prompt", ""], "the prompt is empty"),
        (["generate", "--model", "{tiny}", "--prompt", "x" * 99], "context is 64"),
        (["generate", "--model", "{tiny}", "--prompt", "x", "--temp", "-1"], "temperature is -1.0, but must be"),
        (["generate", "--model", "{tiny}", "--prompt", "x", "--logit-bias", "[1]"], "--logit-bias is JSON"),
        (
            ["generate", "--model", "{tiny}", "--prompt", "x", "--chat-template-config", "3"],
            "--chat-template-config is",
        ),
        (["generate", "--model", "{tiny}", "--prompt", "x", "--extra-eos-token", "nope"], "'nope' is no token"),
        (["generate", "--model", "{tiny}", "--prompt", "x", "--dtype", "float8"], "did you mean 'float"),
        (["generate", "--model", "{tmp}/absent", "--prompt", "x"], "absent"),
        (["generate", "--model", "{tmp}", "--prompt", "x"], "config.json"),
        (["generate", "--model", "{bert}", "--prompt", "the"], "encoder-only"),
        (["chat", "--model", "{bert}"], "no chat template"),
        (["embed", "--model", "{bert}"], "give either texts or --input"),
        (["embed", "--model", "{bert}", "--input", "{tmp}/absent.jsonl"], "absent.jsonl can't be read"),
        (["embed", "--model", "{bert}", "a", "--pooling", "men"], "did you mean 'mean'"),
        (["fill-mask", "--model", "{bert}", "no mask"], "has no mask"),
        (["fill-mask", "--model", "{tiny}", "[MASK]"], "can't fill masks"),
    ],
    ids=lambda value: " ".join(value)[:50].replace("{", "").replace("}", "") if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_status_2(
    mlxlm_command, tiny_directory, tiny_bert_directory, tmp_path_factory, arguments, words
):
    places = {"tiny": tiny_directory, "bert": tiny_bert_directory, "tmp": tmp_path_factory.mktemp("empty")}
    status, out, err = mlxlm_command(*(argument.format(**places) for argument in arguments))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert words in errors[0]
    assert len(errors) == 1
    assert "Traceback" not in err
    assert out == ""


def test_debug_shows_the_traceback_wherever_it_stands(mlxlm_command, tmp_path):
    _, _, err = mlxlm_command("generate", "--model", tmp_path / "absent", "--prompt", "x", "--debug")
    assert "Traceback" in err


@pytest.mark.parametrize("arguments", [["generate", "--promt", "x"], ["genrate"], ["generate", "--max-tokens", "many"]])
def test_a_typo_in_a_flag_is_named(mlxlm_command, arguments):
    status, _, err = mlxlm_command(*arguments)
    assert status == 2
    assert arguments[-2 if len(arguments) > 1 else -1].lstrip("-") in err.replace("\n", " ") or "many" in err


def test_doctor_reports_the_machine(mlxlm_command):
    status, out, _ = mlxlm_command("doctor")
    assert status == 0
    for word in ("mlxlm", "MLX", "BLAS", "memory", "attention    tiled"):
        assert word in out
    assert "FAILED" not in out


def test_doctor_tunes_the_shapes_of_a_model(mlxlm_command, tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXLM_CACHE", str(tmp_path))
    monkeypatch.setattr("mlxlm.cli.doctor._CPU_LENGTHS", (32, 64))
    status, out, _ = mlxlm_command("doctor", "--skip-check", "--tune", "--model", tiny_directory)
    assert status == 0
    assert out.count("chosen: ") == 4
    assert list((tmp_path / "attention").glob("*.json"))
    assert mlxlm_command("doctor", "--tune")[0] == 2
    status, out, error = mlxlm_command("doctor", "--tune", "--model", tmp_path / "nowhere")
    assert (status, out) == (2, "")
    assert "nowhere" in error


@pytest.mark.parametrize(("name", "shapes"), [
    ("t5", [(False, None, ("relative_bias",)), (True, None, ("relative_bias",))]),
    ("gemma2", [(True, 5, ("softcap",)), (True, None, ("softcap",))]),
    ("falcon-alibi", [(True, None, ("alibi",))]),
])  # fmt: skip
def test_doctor_tunes_every_kind_of_attention_of_a_model_once(name, shapes, mlxlm_command, fixture_model, monkeypatch):
    from mlxlm.kernels.attention import selfcheck

    asked = []
    monkeypatch.setattr(selfcheck, "tune", lambda **shape: asked.append(shape) or [])
    assert mlxlm_command("doctor", "--skip-check", "--tune", "--model", fixture_model(name))[0] == 0
    assert sorted(((s["causal"], s["window"], s["modifiers"]) for s in asked), key=str) == shapes


def test_doctor_tunes_gguf_files_and_what_a_hub_id_leads_to(mlxlm_command, monkeypatch):
    from mlxlm import models, runtime
    from mlxlm.kernels.attention import selfcheck

    file = Path(__file__).parent.parent / "fixtures" / "gguf" / "qwen3.gguf"
    asked, timed = [], []
    monkeypatch.setattr(selfcheck, "tune", lambda **shape: asked.append(shape) or [])
    monkeypatch.setattr(models, "find", lambda name: file)
    assert mlxlm_command("doctor", "--skip-check", "--tune", "--model", "some/one")[0] == 0
    assert len(asked) == 1
    monkeypatch.setattr("mlxlm.cli.doctor._tune_steps", lambda path: timed.append(path))
    monkeypatch.setattr(runtime, "backend", lambda: "cuda")
    monkeypatch.setattr("mlxlm.cli.doctor.machine", lambda: None)
    assert mlxlm_command("doctor", "--skip-check", "--tune", "--model", "some/one")[0] == 0
    assert timed == [file]


def test_version(mlxlm_command):
    assert mlxlm_command("--version")[1] == f"mlxlm {mlxlm.__version__}\n"


def test_ctrl_c_stops_a_chat_answer_and_not_the_program(tiny_directory):
    config = json.loads((tiny_directory / "config.json").read_text())
    (tiny_directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10**6}))
    bias = json.dumps({"2": -1e9})  # the answer does not end by itself
    command = [sys.executable, "-m", "mlxlm", "chat", "--model", str(tiny_directory), "--max-tokens", "100000"]
    process = subprocess.Popen(
        [*command, "--logit-bias", bias],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(mlxlm.__file__))},
    )
    try:
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.stdin.write(b"/reset\n/exit\n")
        process.stdin.close()
        err = process.stderr.read().decode()
        assert process.wait(timeout=60) == 0
        assert "interrupted" in err
        assert "the conversation is forgotten" in err
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        process.wait()


def test_ctrl_c_while_the_command_is_imported_is_one_line(monkeypatch, capsys):
    from mlxlm.__main__ import main

    class Interrupts(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name.startswith("mlxlm."):
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "mlxlm.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_ctrl_c_in_a_verb_is_one_line(mlxlm_command, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxlm.cli.options.load", interrupted)
    assert mlxlm_command("generate", "--prompt", "x") == (130, "", "interrupted\n")


def test_output_to_a_device_or_a_link_is_written_and_not_replaced(mlxlm_command, tiny_bert_directory, tmp_path):
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    real.write_text("")
    link.symlink_to(real)
    assert mlxlm_command("embed", "--model", tiny_bert_directory, "a", "-o", link)[0] == 0
    assert link.is_symlink()
    assert json.loads(real.read_text())["text"] == "a"
    status, _, err = mlxlm_command("embed", "--model", tiny_bert_directory, "a", "-o", tmp_path)
    assert status == 2
    assert "is no file that can be written" in err


def test_errors_can_be_caught_by_their_public_name():
    assert mlxlm.errors.MlxlmError.__mro__[1] is ValueError


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("genrate",), "no such command 'genrate'"),
        (("generate", "--promt", "hi"), "no such option: --promt"),
        (("generate",), "missing option '--prompt'"),
        (("plan", "--model", "x", "--batch-size", "many"), "valid integer"),
        (("tokenizer", "encode", "--nonsense"), "(mlxlm tokenizer encode --help lists what there is)"),
        (("--nonsense", "plan"), "no such option: --nonsense"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_what_the_parser_refuses_is_one_line_too(mlxlm_command, words, text):
    status, out, err = mlxlm_command(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert text in err.lower()
