"""What the training tests share: a tiny decoder, a source of batches, and a run that other processes can do too.

python training_runs.py FOLDER STEPS [MOMENT COUNT]   # trains (or resumes) and writes weights to FOLDER/weights.npz

With a moment the process kills itself, with no chance to clean up, the COUNT-th time that it comes to it; with the
moment "after" it is killed COUNT seconds after it has begun, whatever it is doing then.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np

import mlxlm  # noqa: F401  before mlx.core, so that a fast BLAS can be loaded

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}


def tiny_model(seed=1, **changes):
    """A decoder of two layers with drawn weights."""
    from mlxlm.models import Transformer, family_of
    from mlxlm.training.initialisation import initialise

    values = {**CONFIG, **changes}
    model = Transformer(family_of(values).read_config(values))
    initialise(model, seed)
    return model


class Rows:
    """Batches of drawn tokens in two lengths, some targets left out; `batches` ends it."""

    def __init__(self, batches=None, rows=3, lengths=(6, 9), seed=0):
        self.batches, self.rows, self.lengths, self.seed = batches, rows, lengths, seed
        self.index, self.epoch, self.num_tokens = 0, 0, 0

    def next(self):
        if self.batches is not None and self.index >= self.batches:
            return None
        rng = np.random.default_rng((self.seed, self.index))
        length = self.lengths[self.index % len(self.lengths)]
        self.index += 1
        tokens = rng.integers(0, CONFIG["vocab_size"], (self.rows, length + 1)).astype(np.int32)
        targets = tokens[:, 1:].copy()
        key_lengths = rng.integers(2, length + 1, self.rows).astype(np.int32)
        targets[np.arange(length)[None] >= key_lengths[:, None]] = -100
        self.num_tokens += int(key_lengths.sum())
        return {"tokens": tokens[:, :-1], "targets": targets, "key_lengths": key_lengths}

    def state(self):
        return {"index": self.index, "num_tokens": self.num_tokens}

    def restore(self, state):
        self.index, self.num_tokens = state["index"], state["num_tokens"]


class Fixed:
    """The given batches, round and round or once."""

    def __init__(self, batches, once=False):
        self.batches, self.once, self.index, self.epoch, self.num_tokens = batches, once, 0, 0, 0

    def next(self):
        if self.once and self.index >= len(self.batches):
            return None
        self.index += 1
        return self.batches[(self.index - 1) % len(self.batches)]

    def state(self):
        return {"index": self.index}

    def restore(self, state):
        self.index = state["index"]


def weights_of(model):
    """Parameters by name, as numpy arrays, which know no bfloat16."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    arrays = dict(tree_flatten(model.parameters()))
    return {name: np.array(a.astype(mx.float32) if a.dtype == mx.bfloat16 else a) for name, a in arrays.items()}


def same(one, other):
    """Whether two dicts of arrays are equal bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def run(folder, steps, *, until=None, reporters=(), valid=None, **settings):
    """Train the tiny model to `until`, resuming what is in the folder; returns its weights and the result."""
    from mlxlm.training import MetricsFile, Trainer, TrainSettings, WordLoss

    settings = {
        "learning_rate": 3e-3, "report_every": 2, "save_every": 3, "ema_decay": 0.9, "weight_decay": 0.1,
        "accumulation": 2, "keep_last": 2, "warmup_steps": 2, "compile": False, **settings,
    }  # fmt: skip
    model = tiny_model()
    trainer = Trainer(
        model, WordLoss(), Rows(), TrainSettings(steps=steps, **settings), folder, valid=valid,
        reporters=[*([MetricsFile(folder)] if folder else []), *reporters],
    )  # fmt: skip
    result = trainer.run(resume=True, until=until)
    return weights_of(model), result


class Valid(Fixed):
    """Three validation batches."""

    def __init__(self):
        super().__init__([Rows(seed=s).next() for s in (5, 6, 7)], once=True)


# Moments of a run: module, and the function that is entered (or left) then.
MOMENTS = {
    "before a step": ("mlxlm.training.step", "Step.__call__", "enter"),
    "between batches of a step": ("mlxlm.training.step", "Step._arrays", "enter"),
    "while the step is computed": ("mlxlm.training.step", "Step.evaluate_state", "enter"),
    "after the step, before it is counted": ("mlxlm.training.step", "Step.evaluate_state", "leave"),
    "while reporting": ("mlxlm.training.reporters", "MetricsFile._append", "enter"),
    "after reporting": ("mlxlm.training.reporters", "MetricsFile._append", "leave"),
    "while evaluating": ("mlxlm.training.step", "Step.evaluate", "leave"),
    "before a checkpoint": ("mlxlm.training.checkpoints", "Checkpoints.save", "enter"),
    "a file of a checkpoint is there": ("mlxlm.training.checkpoints", "save_safetensors", "leave"),
    "before state.json": ("mlxlm.training.checkpoints", "write_json_atomic", "enter"),
    "before a checkpoint has its name": ("mlxlm.training.checkpoints", "os.rename", "enter"),
    "a checkpoint has its name": ("mlxlm.training.checkpoints", "os.rename", "leave"),
    "before the best is marked": ("mlxlm.training.checkpoints", "Checkpoints.mark_best", "enter"),
    "while old checkpoints are removed": ("mlxlm.training.checkpoints", "Checkpoints._remove", "enter"),
    "an old checkpoint has lost its name": ("mlxlm.training.checkpoints", "shutil.rmtree", "enter"),
    "while reading data": ("training_runs", "Rows.next", "enter"),
}


def die_at(moment, count):
    """Make this process kill itself the `count`-th time that a moment comes."""
    module, name, when = MOMENTS[moment]
    *holders, last = name.split(".")
    holder = sys.modules["__main__"] if module == "training_runs" else importlib.import_module(module)
    for part in holders:
        holder = getattr(holder, part)
    original, seen = getattr(holder, last), itertools.count(1)

    def watched(*arguments, **keywords):
        number = next(seen)
        if when == "enter" and number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, last, watched)


def main():
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3 and sys.argv[3] == "after":
        importlib.import_module("mlxlm.training")  # which takes longer than the run
        tiny_model()
        signal.setitimer(signal.ITIMER_REAL, float(sys.argv[4]))  # SIGALRM, which nobody handles, ends a process
    elif len(sys.argv) > 3:
        die_at(sys.argv[3], int(sys.argv[4]))
    weights, result = run(folder, steps, save_every=2, evaluate_every=3, valid=Valid, keep_last=1)
    if result.reason != "done":
        sys.exit(3)
    np.savez(folder / "weights.npz", **weights)


if __name__ == "__main__":
    main()
