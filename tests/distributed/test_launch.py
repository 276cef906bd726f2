"""`mlxlm launch`: runs of several processes, their checkpoints on other meshes, and what happens when one fails."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from processes import ROOT

import mlxlm
from mlxlm.cli import main
from mlxlm.distributed.launching import environments, launch
from mlxlm.errors import UsageError

RECIPE = """
model: {model_type: llama, vocab_size: 67, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
        num_attention_heads: 4, num_key_value_heads: 2, rms_norm_eps: 1.0e-6, tie_word_embeddings: true}
tokenizer: TOKENIZER
data: {train: [train.jsonl], max_length: 24, batch_size: 4, cache: cache, processes: 1}
objective: {name: causal}
training: {steps: 6, learning_rate: 1.0e-3, eps: 1.0e-6, report_every: 2, save_every: 3, accumulation: 2,
           compile: false}
output: run
"""
PRETRAIN = ("pretrain", "-c", "recipe.yaml")


@pytest.fixture
def command_here(monkeypatch, capfd):
    """A function: arguments -> (exit status, stdout, stderr) of a command in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mlxlm", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.run()
        return ended.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture
def recipe(tmp_path, tiny_directory):
    """A folder with a recipe and its data."""
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list("abcdefgh ."), 60)) for _ in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("TOKENIZER", str(tiny_directory)))
    return tmp_path


def command(folder, *words, processes=None, launcher=()):
    """A finished `mlxlm pretrain`, by itself or under launch."""
    return mlxlm_under(folder, *PRETRAIN, *words, processes=processes, launcher=launcher)


def mlxlm_under(folder, *words, processes=None, launcher=(), said=None):
    """A finished command, by itself or under launch."""
    under = [] if processes is None else ["launch", "-n", str(processes), *launcher, "--"]
    return subprocess.run(
        [sys.executable, "-m", "mlxlm", *under, *map(str, words)],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=False, input=said,
    )  # fmt: skip


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def weights(folder):
    model, _ = mlxlm.load(folder / "model")
    return dict(tree_flatten(model.parameters()))


def close(one, other):
    return max(float(mx.abs(array - other[name]).max()) for name, array in one.items()) < 1e-5


def forget(run, step):
    """Take away the checkpoint of a step, as if the run had been ended before."""
    (run / "checkpoints" / f"step-{step:08d}").rename(run / f"forgotten-{secrets.token_hex(2)}")


def test_a_run_of_two_goes_on_alone_and_ends_as_one_that_never_stopped(recipe, monkeypatch, command_here):
    monkeypatch.chdir(recipe)
    assert command_here(*PRETRAIN, "--output", "alone")[0] == 0
    done = command(recipe, "--output", "two", "--zero", "2", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("step 2/6") == 1  # only the first process reports
    assert close(weights(recipe / "two"), weights(recipe / "alone"))
    step = recipe / "two" / "checkpoints" / "step-00000003"
    parts = [path.stat().st_size for path in sorted(step.glob("parameters-*"))]
    assert len(parts) == 2
    assert max(parts) < 1.1 * min(parts)
    forget(recipe / "two", 6)
    assert "from step 3" in command_here(*PRETRAIN, "--output", "two", "--resume")[2]
    assert close(weights(recipe / "two"), weights(recipe / "alone"))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [((4, "dp=2,tp=2"), (2, "pp=2")), ((2, "tp=2"), (2, "dp=2"))])
def test_a_run_goes_on_on_another_mesh(recipe, monkeypatch, command_here, first, then):
    monkeypatch.chdir(recipe)
    assert command_here(*PRETRAIN, "--output", "alone")[0] == 0
    assert command(recipe, "--output", "run", "--mesh", first[1], "--zero", "1", processes=first[0]).returncode == 0
    assert close(weights(recipe / "run"), weights(recipe / "alone"))
    forget(recipe / "run", 6)
    done = command(recipe, "--output", "run", "--mesh", then[1], "--resume", processes=then[0])
    assert "from step 3" in done.stderr
    assert close(weights(recipe / "run"), weights(recipe / "alone"))


def test_mistakes_end_all_processes_with_one_line_each(recipe, command_here):
    done = command(recipe, "--mesh", "tp=3", processes=2)
    assert done.returncode == 2
    assert "--mesh tp=3 is for 3 processes, but there are 2; --mesh tp=2 would do" in done.stderr
    assert "Traceback" not in done.stderr
    status, _, error = command_here("pretrain", "-c", recipe / "recipe.yaml", "--mesh", "dp=2")
    assert (status, "mlxlm launch -n 2" in error) == (2, True)


def test_an_answer_by_two_processes_is_that_of_one(tiny_directory, command_here):
    words = ["generate", "--model", tiny_directory, "--prompt", "abc", "-m", 8]
    status, answer, _ = command_here(*words)
    assert status == 0
    done = mlxlm_under(tiny_directory, *words, processes=2)
    assert (done.returncode, done.stdout) == (0, answer)
    assert done.stderr.count("loaded in") == 1


@pytest.mark.slow
def test_adapters_of_two_processes_are_those_of_one(tiny_directory, tmp_path, command_here):
    rows = [{"prompt": f"{letter}b", "completion": f"{letter}c"} for letter in "abcdefghijkl"]
    for name, part in (("train", rows[:9]), ("valid", rows[9:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    words = ["finetune", "--model", tiny_directory, "--data", tmp_path, "--iters", 4, "--batch-size", 3, "--seed", 1]
    assert command_here(*words, "--adapter-path", tmp_path / "one")[0] == 0
    done = mlxlm_under(tmp_path, *words, "--adapter-path", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (mx.load(str(tmp_path / name / "adapter_model.safetensors")) for name in ("one", "two"))
    assert close(one, two)
    ask = ["generate", "--model", tiny_directory, "--prompt", "abc", "-m", 8, "--adapter-path", tmp_path / "one"]
    done = mlxlm_under(tmp_path, *ask, "--mesh", "tp=2", processes=2)
    assert (done.returncode, done.stdout) == (0, command_here(*ask)[1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2"])
def test_two_processes_chat_and_measure_as_one(tiny_directory, tmp_path, command_here, mesh):
    said = "hi there\n/reset\n/nothing\nabc\n"
    words = ["chat", "--model", tiny_directory, "-m", 6]
    alone = mlxlm_under(tmp_path, *words, said=said)
    done = mlxlm_under(tmp_path, *words, "--mesh", mesh, processes=2, said=said)
    assert (done.returncode, done.stdout) == (alone.returncode, alone.stdout)
    assert done.stderr.count("the conversation is forgotten") == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": one, "completion": one[::-1]}) + "\n" for one in ("abc", "hello")))
    words = ["evaluate", "--model", tiny_directory, "--data", rows]
    _, alone, _ = command_here(*words)
    done = mlxlm_under(tmp_path, *words, "--mesh", mesh, "--predictions", tmp_path / "said.jsonl", processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(json.loads(alone)["loss"], abs=1e-5)
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 2


def test_what_can_not_be_shared_is_told_in_one_line(command_here):
    status, _, error = command_here("launch", "-n", 2, "--", "serve")
    assert (status, error.count("\n")) == (2, 1)
    assert "'serve' is no verb that several processes can share; these are: pretrain, finetune, align" in error


def script(text):
    return [sys.executable, "-c", text]


def test_the_launcher_restarts_what_failed_and_names_who(tmp_path, capfd):
    said = []
    flaky = script(
        "import os, sys, pathlib; rank = os.environ['MLX_RANK']\n"
        "print('here', file=sys.stderr) if rank == '1' else print('out')\n"
        f"again = pathlib.Path({str(tmp_path / 'again')!r})\n"
        "if rank == '1' and '--resume' not in sys.argv: os.kill(os.getpid(), 9)"
    )
    assert launch(flaky, 2, restarts=1, resume=("--resume",), say=said.append) == 0
    assert said == ["the run ended: rank 1 was ended by SIGKILL", "starting again, 0 more times at most"]
    out, err = capfd.readouterr()
    assert out == "out\nout\n"
    assert err.count("[1] here\n") == 2
    assert launch(flaky, 2, say=said.append) == 128 + signal.SIGKILL


def test_a_restart_before_the_first_checkpoint_begins_anew(tmp_path):
    said = []
    flaky = script(
        "import os, sys, pathlib; rank = os.environ['MLX_RANK']\n"
        "if '--resume' in sys.argv: sys.exit(2)\n"
        f"first = pathlib.Path({str(tmp_path / 'first')!r} + rank)\n"
        "if not first.exists() and rank == '1': first.touch(); os.kill(os.getpid(), 9)"
    )
    assert launch(flaky, 2, restarts=1, resume=("--resume",), say=said.append) == 0
    assert said[-1] == "there is nothing to go on from; starting from the beginning"


def test_the_launcher_tells_the_cause_from_those_who_noticed(capfd):
    said = []
    noticed = "import os, sys, time; rank = os.environ['MLX_RANK']; time.sleep(0.4 * (rank == '1'))\n"
    assert launch(script(noticed + "sys.exit(75 if rank == '0' else 9)"), 2, say=said.append) == 9
    assert said == ["the run ended: rank 1 ended with status 9"]
    # A mistake of the user's is no reason to try again.
    assert launch(script("import sys; sys.exit(2)"), 2, restarts=5, say=said.append) == 2
    assert len(said) == 1
    with pytest.raises(UsageError, match="at least 1"):
        launch(["x"], 0, say=said.append)


@pytest.mark.slow
def test_killing_each_rank_in_turn_20_times_loses_nothing(recipe):
    """Each kill is followed by a restart; the run ends bit for bit as one that was left alone."""
    settings = ["--set", "training.steps=120", "--set", "training.save_every=2", "--set", "training.accumulation=1"]
    whole = command(recipe, "--output", "whole", *settings, processes=2)
    assert whole.returncode == 0, whole.stderr
    rng, kills = random.Random(4), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxlm", "launch", "-n", "2", "--restarts", "30", "--timeout", "20", "--", "pretrain",
         "-c", "recipe.yaml", "--output", "killed", *settings],
        cwd=recipe, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = set()
    while process.poll() is None and kills < 20:
        ranks = [pid for pid in children(process.pid) if pid not in seen]
        if len(ranks) < 2:
            time.sleep(0.05)
            continue
        time.sleep(rng.uniform(0.3, 1.5))
        seen.update(ranks)
        os.kill(sorted(ranks)[kills % 2], signal.SIGKILL)
        kills += 1
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert kills == 20
    assert "SIGKILL" in error
    one, other = weights(recipe / "whole"), weights(recipe / "killed")
    assert all(mx.array_equal(array, other[name]) for name, array in one.items())


def children(pid):
    """Processes that a process has started and that still run."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(name))
    return found


@pytest.mark.slow
def test_the_examples_run(tmp_path):
    recipe = ROOT / "examples" / "distributed" / "recipe.yaml"
    words = ["pretrain", "--config", recipe, "--mesh", "dp=2,tp=2", "--output", tmp_path / "run", "--steps", 6]
    done = mlxlm_under(ROOT, *words, processes=4)
    assert done.returncode == 0, done.stderr
    rows = ROOT / "examples" / "distributed" / "rows"
    done = mlxlm_under(ROOT, "finetune", "--data", rows, "--iters", 2, "--adapter-path", tmp_path / "a", processes=2)
    assert done.returncode == 0, done.stderr


def test_each_process_of_nccl_has_a_gpu_of_its_own(tmp_path, monkeypatch, command_here):
    monkeypatch.setenv("MLX_HOSTFILE", "another run's")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    one, two = environments(2, "nccl", tmp_path)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in (one, two)] == ["3", "5"]
    assert [(each["MLX_RANK"], each["MLX_WORLD_SIZE"]) for each in (one, two)] == [("0", "2"), ("1", "2")]
    assert (one["NCCL_HOST_IP"], one["NCCL_PORT"]) == (two["NCCL_HOST_IP"], two["NCCL_PORT"])
    assert "MLX_HOSTFILE" not in one
    with pytest.raises(UsageError, match="4 processes need a GPU each"):
        environments(4, "nccl", tmp_path)
    status, _, error = command_here("launch", "-n", 2, "--backend", "mpi", "--", "generate")
    assert (status, "processes of one machine talk over ring or nccl" in error) == (2, True)
