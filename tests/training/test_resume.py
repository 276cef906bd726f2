"""A run that was stopped, killed or refused by the disk goes on as if nothing had happened."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_runs import MOMENTS, Valid, run, same, tiny_model, weights_of

from mlxlm.errors import CheckpointError, UsageError
from mlxlm.training import Checkpoints, Reporter, TrainingState, read_metrics
from mlxlm.training.lock import locked

SCRIPT = Path(__file__).with_name("training_runs.py")


def start(folder, steps, *moment):
    """The same run in another process.  moment: at which it kills itself, and at its how many-eth coming."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(steps), *map(str, moment)]
    return subprocess.Popen(command, env=environment)


@pytest.mark.parametrize(
    "settings",
    [
        *({"optimizer": name} for name in ("adamw", "adafactor", "lion", "muon", "sgd")),
        {"dtype": "bfloat16", "recompute_layers": -1, "schedule": "wsd", "decay_steps": 4},
        {"dtype": "bfloat16", "master_weights": False, "schedule": "inverse-sqrt"},
    ],
    ids=str,
)
def test_2n_steps_equal_n_and_n_more_bit_for_bit(settings, tmp_path):
    """With dropout, an average of the weights and batches of two lengths."""
    whole, _ = run(tmp_path / "whole", 10, **settings)
    _, half = run(tmp_path / "halves", 10, until=5, **settings)
    assert (half.step, half.reason) == (5, "until")
    again, result = run(tmp_path / "halves", 10, **settings)
    assert same(whole, again)
    assert (result.step, result.reason) == (10, "done")
    curves = [
        {row["step"]: (row["loss"], row["learning_rate"], row["tokens"]) for row in read_metrics(tmp_path / name)}
        for name in ("whole", "halves")
    ]
    assert {step: curves[1][step] for step in curves[0]} == curves[0]


def test_a_resumed_run_stops_as_early_as_the_whole_one(tmp_path):
    settings = {
        "evaluate_every": 1, "patience": 3, "valid": Valid, "learning_rate": 0.5, "schedule": "constant",
        "save_every": 0, "accumulation": 1,
    }  # fmt: skip
    whole, expected = run(tmp_path / "whole", 60, **settings)
    assert expected.reason == "early"
    run(tmp_path / "parts", 60, until=expected.best_step + 2, **settings)
    weights, result = run(tmp_path / "parts", 60, **settings)
    assert same(whole, weights)
    assert (result.reason, result.step, result.best) == ("early", expected.step, expected.best)


def test_bug_6_a_resumed_run_keeps_its_step_its_optimizer_and_its_files(tmp_path):
    run(tmp_path, 10, until=4)
    before = Checkpoints(tmp_path).load(4)
    saved = (Checkpoints(tmp_path).path(4) / "parameters.safetensors").read_bytes()
    seen = []

    class Start(Reporter):
        def on_start(self, trainer):
            seen.append(trainer.progress.step)
            arrays = trainer.step.optimizer.arrays()
            assert same(
                {k: np.array(v) for k, v in arrays.items()},
                {k: np.array(v) for k, v in before.arrays["optimizer"].items()},
            )

    run(tmp_path, 10, until=5, reporters=[Start()])
    assert seen == [4]
    assert (Checkpoints(tmp_path).path(4) / "parameters.safetensors").read_bytes() == saved


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    from training_runs import Rows

    from mlxlm.training import Trainer, TrainSettings, WordLoss

    run(tmp_path, 4, until=2)
    trainer = Trainer(tiny_model(), WordLoss(), Rows(), TrainSettings(steps=4), tmp_path)
    with pytest.raises(UsageError, match="holds a run of 2 steps"):
        trainer.run()


@pytest.mark.parametrize("change", [{"optimizer": "lion"}, {"ema_decay": None}], ids=str)
def test_a_checkpoint_of_other_settings_is_refused(change, tmp_path):
    run(tmp_path, 4, until=2, optimizer="adamw")
    if "optimizer" in change:
        with pytest.raises(CheckpointError, match="another optimizer"):
            run(tmp_path, 4, **change)
    else:
        run(tmp_path, 4, **change)  # leaving the average out is no harm


def uninterrupted(steps, folder):
    """Weights and validation losses of the run that `start` starts, in this process."""
    weights, _ = run(folder, steps, save_every=2, evaluate_every=3, valid=Valid, keep_last=1)
    return weights


def end(folder, steps):
    """Let the run end; its weights."""
    assert start(folder, steps).wait() == 0
    with np.load(folder / "weights.npz") as file:
        return dict(file)


def metrics_of(folder):
    """What was reported at each step, times left out."""
    kept = ("step", "loss", "valid_loss", "tokens", "learning_rate")
    return [{name: row[name] for name in kept if name in row} for row in read_metrics(folder)]


def killed_at_random(folder, steps, kills, seconds, rng):
    """Kill a run at so many random moments, on the average `kills` of them spread over all of it; a new one begins
    where one has ended before. Gives the folders of the runs, of which only the last may be unfinished.
    """
    folders, left = [folder / "0"], kills
    while left:
        status = start(folders[-1], steps, "after", rng.uniform(0.0, 2 * seconds / kills)).wait()
        assert status in (0, -signal.SIGALRM)
        if status == 0:
            folders.append(folder / str(len(folders)))
        else:
            left -= 1
    return folders


@pytest.mark.parametrize(("steps", "kills"), [(30, 1), pytest.param(200, 20, marks=pytest.mark.slow)])
def test_a_run_killed_at_moments_of_the_clock_is_ended_by_another_process_as_if_it_was_not(steps, kills, tmp_path):
    """Anywhere in it, whatever it was doing: in a step, in MLX, while it wrote, read or evaluated."""
    begun = time.perf_counter()
    whole = uninterrupted(steps, tmp_path / "whole")
    seconds = time.perf_counter() - begun
    for folder in killed_at_random(tmp_path, steps, kills, seconds, random.Random(1)):
        assert same(whole, end(folder, steps))
        assert metrics_of(folder) == metrics_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_of_every_kind_ends_as_if_it_was_not(tmp_path):
    """Each of the kinds of moments once, and four of them again; the same run goes on after each kill."""
    whole = uninterrupted(60, tmp_path / "whole")
    rng = random.Random(7)
    moments = [*MOMENTS, *rng.sample(sorted(MOMENTS), 20 - len(MOMENTS))]
    rng.shuffle(moments)
    folder = tmp_path / "killed"
    for moment in moments:
        assert start(folder, 60, moment, rng.randrange(2, 5)).wait() == -signal.SIGKILL, moment
    assert same(whole, end(folder, 60))
    assert metrics_of(folder) == metrics_of(tmp_path / "whole")
    assert Checkpoints(folder).best() == Checkpoints(tmp_path / "whole").best()


class Interrupt(Reporter):
    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_metrics(self, metrics):
        if metrics["step"] == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_and_ends_the_run(number, tmp_path):
    whole, _ = run(None, 8)
    before = signal.getsignal(number)
    _, result = run(tmp_path, 8, reporters=[Interrupt(number, 4)])
    assert (result.reason, result.step) == (number.name, 4)
    assert Checkpoints(tmp_path).steps()[-1] == 4
    assert signal.getsignal(number) is before
    assert same(whole, run(tmp_path, 8)[0])


def test_a_second_signal_forces_the_end(tmp_path):
    class Twice(Reporter):
        def on_metrics(self, metrics):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 8, reporters=[Twice()])
    assert Checkpoints(tmp_path).steps() == []


def test_a_full_disk_leaves_the_earlier_checkpoint_and_the_run_going(tmp_path, monkeypatch):
    import mlxlm.training.checkpoints as module

    original, messages = module.save_safetensors, []

    def full(directory, arrays, **keywords):
        if "step-00000006" in str(directory) and keywords["stem"] == "optimizer":
            raise OSError(28, "No space left on device")
        return original(directory, arrays, **keywords)

    class Listen(Reporter):
        def on_message(self, text):
            messages.append((text, Checkpoints(tmp_path).steps()))

    monkeypatch.setattr(module, "save_safetensors", full)
    run(tmp_path, 9, reporters=[Listen()])
    ((text, steps),) = messages
    assert "step 6: no checkpoint" in text
    assert "No space left on device" in text
    assert steps == [3]
    assert Checkpoints(tmp_path).steps() == [3, 9]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_disk_that_takes_no_more_bytes_at_the_end_is_an_error(tmp_path):
    """The operating system itself refuses, in MLX's own writer."""
    resource = pytest.importorskip("resource", reason="this system has no limits of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"can't write .*File too large"):
            run(tmp_path, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Checkpoints(tmp_path).steps() == []
    assert not list((tmp_path / "checkpoints").iterdir())


# What is done to a file of a checkpoint, and what is then said of it.
DAMAGE = {
    "cut": (
        "optimizer.safetensors",
        lambda file: file.write_bytes(file.read_bytes()[:-4]),
        r" is damaged: it has .* by",
    ),
    "gone": ("average.safetensors", lambda file: file.unlink(), r" is damaged: it is missing, .* bytes were saved"),
    "overwritten": ("parameters.safetensors", lambda file: file.write_bytes(b"x" * file.stat().st_size), ""),
    "no state": ("state.json", lambda file: file.unlink(), ": no such file"),
    "half a state": ("state.json", lambda file: file.write_bytes(file.read_bytes()[:99]), " is not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_whole_one_before_it(damage, tmp_path):
    name, harm, said = DAMAGE[damage]
    whole, messages = run(None, 8)[0], []

    class Listen(Reporter):
        def on_message(self, text):
            messages.append((text, metrics_of(tmp_path)[-1]["step"]))

    run(tmp_path, 8, until=5, evaluate_every=5, valid=Valid)  # the best one so far
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.steps(), checkpoints.best()) == ([3, 5], 5)
    harm(checkpoints.path(5) / name)
    again, _ = run(tmp_path, 8, reporters=[Listen()])
    assert same(whole, again)
    ((text, kept),) = messages
    assert re.search(f"step-00000005/{re.escape(name)}{said}.*goes on from the whole checkpoint before it", text)
    assert kept == 2  # what had been reported of later steps is cut off
    assert checkpoints.best() is None
    assert (checkpoints.folder / "damaged-step-00000005").is_dir()
    assert [row["step"] for row in metrics_of(tmp_path)] == [2, 4, 6, 8]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_only_checkpoint_is_named_with_what_to_do(damage, tmp_path):
    name, harm, said = DAMAGE[damage]
    run(tmp_path, 4, until=2)
    harm(Checkpoints(tmp_path).path(2) / name)
    way_on = (
        r"no checkpoint .* is whole.*put the file back from a copy, or start a new run in another folder \(.*--output"
    )
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}{said}.*{way_on}"):
        run(tmp_path, 4)
    assert Checkpoints(tmp_path).steps() == [2]  # nothing is touched


def test_a_process_killed_while_a_checkpoint_is_replaced_by_one_of_its_step_loses_neither(tmp_path, monkeypatch):
    run(tmp_path, 8, until=4, keep_last=1)
    checkpoints, rename = Checkpoints(tmp_path), os.rename

    class Killed(BaseException):
        pass

    def killed(source, target):
        if str(source).endswith(".tmp"):
            raise Killed
        rename(source, target)

    state = checkpoints.load(4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(Killed):
            checkpoints.save(4, state)
    assert checkpoints.steps() == []
    checkpoints.recover()
    shutil.copytree(checkpoints.path(4), checkpoints.folder / ".step-00000004.replaced")  # killed a moment later
    checkpoints.recover()
    assert (checkpoints.steps(), same(whole_of(state), whole_of(checkpoints.load(4)))) == ([4], True)
    checkpoints.save(4, state)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000004"]


def whole_of(state):
    """All arrays of a checkpoint by one name."""
    return {f"{part}/{name}": np.array(array) for part, some in state.arrays.items() for name, array in some.items()}


def test_a_finished_run_that_is_resumed_reports_nothing_twice(tmp_path):
    settings = {"report_every": 4, "valid": Valid, "learning_rate": 1.0, "evaluate_every": 3}  # the loss only rises
    run(tmp_path, 7, **settings)
    rows = read_metrics(tmp_path)
    assert [(row["step"], "valid_loss" in row) for row in rows] == [
        (3, True),
        (4, False),
        (6, True),
        (7, False),
        (7, True),
    ]
    for _ in range(2):
        run(tmp_path, 7, **settings)
        assert read_metrics(tmp_path) == rows


def test_the_speed_of_a_resumed_run_leaves_out_what_was_done_before(tmp_path, monkeypatch):
    """By a clock on which everything takes a second."""
    import mlxlm.training.progress as module

    seconds = itertools.count(time.perf_counter())
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(seconds))
    run(tmp_path / "whole", 8, report_every=4, save_every=0)
    run(tmp_path / "halves", 8, until=7, report_every=4, save_every=0)
    run(tmp_path / "halves", 8, report_every=4, save_every=0)
    whole, halves = (read_metrics(tmp_path / name)[-1]["tokens_per_second"] for name in ("whole", "halves"))
    assert halves < whole / 2


def test_a_resumed_run_cuts_metrics_after_its_checkpoint_and_torn_lines(tmp_path):
    run(tmp_path, 8, until=4)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    run(tmp_path, 8, until=6)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["loss"] != 1.0


def test_pruning_keeps_the_best_and_removes_leftovers(tmp_path):
    import mlx.core as mx

    checkpoints = Checkpoints(tmp_path, keep_last=1)
    arrays = {"parameters": {"w": mx.ones(2)}, "optimizer": {"m": mx.ones(2)}}
    for step in (1, 2, 3):
        checkpoints.save(step, TrainingState(arrays, {"step": step}))
    checkpoints.mark_best(1, 0.5)
    (checkpoints.folder / ".step-00000009.abcd.tmp").mkdir()
    checkpoints.prune()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000001", "step-00000003"]


def test_the_weights_of_the_tiny_model_do_not_depend_on_the_process():
    assert same(weights_of(tiny_model()), weights_of(tiny_model()))


class Interrupted(Valid):
    """Validation batches; a signal comes while the second evaluation is under way."""

    number, evaluations = None, 0

    def __init__(self):
        super().__init__()
        Interrupted.evaluations += 1

    def next(self):
        if Interrupted.number is not None and Interrupted.evaluations == 2 and self.index == 1:
            os.kill(os.getpid(), Interrupted.number)
        return super().next()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_during_an_evaluation_leaves_it_and_the_resumed_run_makes_it_anew(number, tmp_path, monkeypatch):
    settings = {"evaluate_every": 3, "patience": 9, "valid": Interrupted}
    whole, expected = run(tmp_path / "whole", 8, **settings)
    seen = [row for row in read_metrics(tmp_path / "whole") if "valid_loss" in row]
    assert [row["step"] for row in seen] == [3, 6, 8]
    monkeypatch.setattr(Interrupted, "evaluations", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupted, "number", number)
        _, result = run(tmp_path / "cut", 8, **settings)
    assert (result.reason, result.step, Checkpoints(tmp_path / "cut").steps()[-1]) == (number.name, 6, 6)
    again, result = run(tmp_path / "cut", 8, **settings)
    assert same(whole, again)
    assert (result.best, result.best_step) == (expected.best, expected.best_step)
    assert [row for row in read_metrics(tmp_path / "cut") if "valid_loss" in row] == seen


def test_a_best_checkpoint_whose_mark_was_not_written_is_marked_when_the_run_goes_on(tmp_path):
    run(tmp_path, 8, until=4, evaluate_every=4, valid=Valid)
    assert Checkpoints(tmp_path).best() == 4
    (tmp_path / "best.json").unlink()
    run(tmp_path, 8, until=5, evaluate_every=4, valid=Valid)
    assert Checkpoints(tmp_path).best() == 4


def test_two_runs_in_one_folder_are_refused_and_the_first_goes_on(tmp_path):
    class Second(Reporter):
        status = None

        def on_metrics(self, metrics):
            if metrics["step"] == 4:
                with pytest.raises(UsageError, match="another process is training in"), locked(tmp_path):
                    pass
                Second.status = start(tmp_path, 8).wait()

    whole, _ = run(None, 8)
    weights, result = run(tmp_path, 8, reporters=[Second()])
    assert Second.status == 1
    assert (result.reason, same(whole, weights)) == ("done", True)
    with locked(tmp_path):  # afterwards the folder is free
        pass


def test_data_that_changed_is_refused_and_named(tmp_path):
    from mlxlm.data import TokenReader
    from mlxlm.errors import DataError
    from mlxlm.objectives import CausalLM
    from mlxlm.training import Trainer, TrainSettings, WordLoss

    def trainer(documents):
        reader = TokenReader(store(tmp_path, documents), CausalLM(), batch_size=2, max_length=8)
        settings = TrainSettings(steps=6, save_every=2, compile=False)
        return Trainer(tiny_model(), WordLoss(), reader, settings, tmp_path / "run")

    documents = [np.arange(5, 30), np.arange(3, 20), np.arange(7, 33)]
    trainer(documents).run(until=3)
    with pytest.raises(DataError, match=r"the documents are not those that .* began with"):
        trainer([*documents, np.arange(6, 12)]).run(resume=True)
    assert trainer(documents).run(resume=True).reason == "done"


def store(folder, documents):
    """A token store of these documents."""
    from mlxlm.data import TokenStore

    path = folder / f"shard-{len(documents)}.bin"
    path.write_bytes(np.concatenate(documents).astype(np.uint16).tobytes())
    np.save(path.with_suffix(".npy"), np.array([[len(one) for one in documents], range(len(documents))], np.uint64))
    return TokenStore.open([path], np.dtype(np.uint16))
