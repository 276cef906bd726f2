"""What ranks do in test_sharing.py: runs of alignment whose work they share, one of them stopped and resumed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent))
from alignment_runs import settings_for

from mlxlm.alignment import align
from mlxlm.training.reporters import Reporter

# Five comparisons in batches of three: of the last batch one process has nothing but what fills it up.
ODD = {"batch_size": 3, "optimizer": "sgd", "learning_rate": 0.05, "iters": 3, "steps_per_eval": 0, "samples": 0}
CASES = {
    "reward": {"fine_tune_type": "full"},
    "dpo": {},
    "kto": {"learning_rate": 0.5},
    "grpo": {"batch_size": 5, "kl_target": 0.5, "passes": 2},
    "dr-grpo": {"prompts_per_iteration": 3, "batch_size": 4},
    "ppo": {"prompts_per_iteration": 3, "batch_size": 4, "ptx_weight": 1.0, "passes": 2},
}


class Stop(Reporter):
    """Ends the run as a signal would, after two steps."""

    def on_metrics(self, metrics):
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)


def aligned(method, model, data, folder, joined=None, reporters=(), resume=False):
    """One run: its outcome and what it saved, by name."""
    texts = {"ptx_data": str(Path(data).parent / "texts" / "train.jsonl")} if method == "ppo" else {}
    settings = settings_for(method, model, Path(data) / method, folder, **{**ODD, **CASES[method], **texts})
    outcome = align(settings, reporters, joined=joined, resume=resume, say=lambda text: None)
    return outcome, {} if outcome.stopped else saved(folder)


def saved(folder):
    """The tensors that a run saved."""
    (file,) = Path(folder).glob("*.safetensors")
    return mx.load(str(file))


def shared(world, folder, model, data, *methods):
    """What every rank made of each case: the tensors saved, and the measures after."""
    from mlxlm.distributed import Joined, Mesh

    joined, result = Joined(world, Mesh(dp=world.size)), {}
    for method in methods:
        if method == "grpo":
            stopped, _ = aligned(method, model, data, folder / method, joined, [Stop()])
            assert stopped.stopped
        outcome, tensors = aligned(method, model, data, folder / method, joined, resume=method == "grpo")
        result |= {f"{method}/{name}": array for name, array in tensors.items()}
        result |= {f"{method}/after {name}": value for name, value in outcome.after.items()}
    return result
