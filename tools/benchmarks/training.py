"""Training steps against mlx-lm: tokens a second and peak memory, in one run on one machine.

usage: python tools/benchmarks/training.py [--shape tiny|small|1b] [--mode full lora] [--length 512] [--batch-size 1]
           [--steps 10] [--warmup 3] [--repeats 3] [--recompute] [--memory-limit GB] [--dtype bfloat16] [--masters]
           [--only ours]

Both train the same LLaMA shape from random weights on the same random tokens, each in its own trainer and its own
default ways, in fresh processes in turn. A step's time is that from report to report, one each step, with all that the
trainers do in between; a process gives the median and the fastest of its steps, and the table the medians of these over
the repeats. The first steps, which compile kernels, count neither for the times nor for the peak. What a process has
reached is told as it goes, so that a run that is cut off says something.

lora: rank 8 on all linear layers. AdamW. Weights and its state are in `--dtype`, as mlx-lm has them for full training,
unless --masters asks ours to keep float32 ones; mlx-lm's adapters always have float32 weights, which --masters is the
like of. --memory-limit: of MLX, for both. On Linux both get the same BLAS. Without mlx-lm its lines are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 8192},
    "small": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
              "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
RANK = 8


def values_of(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    return {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000.0,
            "max_position_embeddings": 131072, **SHAPES[shape]}  # fmt: skip


def rows(job: dict[str, Any]) -> Any:
    """Random tokens (B, L + 1), the same for both."""
    import numpy as np

    size = job["batch_size"], job["length"] + 1
    return np.random.default_rng(0).integers(0, SHAPES[job["shape"]]["vocab_size"], size).astype(np.int32)


class Clock:
    """Times of the steps of one process, and what it has reached on its standard error."""

    def __init__(self, job: dict[str, Any]):
        import mlx.core as mx

        self.mx, self.job, self.times = mx, job, [time.perf_counter()]
        self.tell("started")

    def tell(self, what: str) -> None:
        """One line, at once."""
        job = self.job
        print(f"  {job['mode']} {job['who']}: {what}, {time.perf_counter() - self.times[0]:.1f} s", file=sys.stderr)

    def step(self) -> None:
        """A step is over."""
        self.times.append(time.perf_counter())
        done, warmup = len(self.times) - 1, self.job["warmup"]
        if done <= warmup:
            self.tell(f"step {done}")
        if done == warmup:
            self.mx.reset_peak_memory()
            self.start = time.perf_counter()
        elif done > warmup and (done - warmup) % 5 == 0:
            self.tell(f"step {done}, median so far {1e3 * self.figures()['seconds']:.1f} ms")

    def figures(self) -> dict[str, Any]:
        """Median and fastest of the steps so far, and the peak of memory."""
        warmup, count = self.job["warmup"], self.job["steps"]
        last = self.times[warmup + 1 : warmup + 1 + count]
        steps = [after - before for before, after in zip([self.start, *last], last, strict=False)]
        return {"seconds": statistics.median(steps), "fastest": min(steps), "peak": self.mx.get_peak_memory(),
                "steps": [round(1e3 * seconds, 1) for seconds in steps]}  # fmt: skip


def run_ours(job: dict[str, Any]) -> dict[str, float]:
    """Seconds a step and peak bytes of mlxlm's trainer."""
    import mlx.core as mx

    from mlxlm import peft
    from mlxlm.models import Transformer, family_of
    from mlxlm.training import Reporter, Trainer, TrainSettings, WordLoss
    from mlxlm.training.initialisation import initialise

    class Same:
        """One batch, again and again."""

        epoch = num_tokens = 0
        batch = {"tokens": rows(job)[:, :-1], "targets": rows(job)[:, 1:]}  # noqa: RUF012

        def next(self) -> Any:
            return self.batch

        def state(self) -> dict[str, Any]:
            return {}

    clock = Clock(job)

    class Steps(Reporter):
        def on_metrics(self, metrics: dict[str, Any]) -> None:
            clock.step()

    values = values_of(job["shape"])
    model = Transformer(family_of(values).read_config(values))
    model.set_dtype(getattr(mx, job["dtype"]))
    initialise(model, 0)
    if job["mode"] == "lora":
        peft.apply(model, peft.Lora(rank=RANK, targets=("all-linear",)))
    mx.eval(model.parameters())
    clock.tell("the model is there")
    settings = TrainSettings(
        # One more, since a step ends for the host when the next one is under way.
        steps=job["warmup"] + job["steps"] + 1, report_every=1, learning_rate=1e-5, schedule="constant", clip_norm=None,
        dtype=job["dtype"], master_weights=job["masters"], recompute_layers=-1 if job["recompute"] else 0,
    )  # fmt: skip
    Trainer(model, WordLoss(), Same(), settings, reporters=[Steps()]).run()
    return clock.figures()


def run_theirs(job: dict[str, Any]) -> dict[str, float]:
    """Seconds a step and peak bytes of mlx-lm's trainer."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_map
    from mlx_lm.models import llama
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    class Enough(Exception):
        """The last figures are there; what follows would only save weights."""

    clock = Clock(job)

    class Steps(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            clock.step()
            if len(clock.times) > job["warmup"] + job["steps"]:
                raise Enough

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(values_of(job["shape"])))
    model.update(tree_map(lambda array: array.astype(getattr(mx, job["dtype"])), model.parameters()))
    mx.eval(model.parameters())
    if job["mode"] == "lora":
        model.freeze()
        config = {"rank": RANK, "scale": 20.0, "dropout": 0.0}
        linear_to_lora_layers(model, len(model.layers), config)
    mx.eval(model.parameters())
    clock.tell("the model is there")
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArgs(
            batch_size=job["batch_size"], iters=job["warmup"] + job["steps"], steps_per_report=1, steps_per_eval=10**9,
            steps_per_save=10**9, max_seq_length=job["length"] + 1, grad_checkpoint=job["recompute"],
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )  # fmt: skip
        data = [(row.tolist(), 0) for row in rows(job)]
        with contextlib.suppress(Enough):
            train(model, optim.AdamW(learning_rate=1e-5), data, args=settings, training_callback=Steps())
    return clock.figures()


def child(text: str) -> None:
    """Measure one job in this process and print the figures as the last line."""
    job = json.loads(text)
    if job["who"] == "mlxlm":
        import mlxlm  # before mlx, so that a fast BLAS can be loaded

        if job["recompute"]:
            mlxlm.runtime.small_command_graphs()  # as the commands do for such runs
    if job["memory_limit"]:
        import mlx.core as mx

        mx.set_memory_limit(int(job["memory_limit"] * 1e9))
    print(json.dumps((run_ours if job["who"] == "mlxlm" else run_theirs)(job)))


def figures(job: dict[str, Any], environment: dict[str, str]) -> dict[str, float] | str:
    """What a fresh process measures, or that it failed; why, it says itself."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    return f"failed ({done.returncode})" if done.returncode else json.loads(done.stdout.strip().splitlines()[-1])


def environments() -> dict[str, dict[str, str]]:
    """Of both programs: the package is found, and mlx-lm has the BLAS that mlxlm loads."""
    from mlxlm.runtime import load_blas

    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    ours = {**os.environ, "PYTHONPATH": path}
    blas = load_blas()
    theirs = {**ours, "LD_PRELOAD": blas.name} if blas.status == "loaded" and blas.name else ours
    return {"mlxlm": ours, "mlx-lm": theirs}


def main() -> None:
    """Measure both in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--mode", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default=None, help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--recompute", action="store_true", help="all layers are computed again for their gradients")
    parser.add_argument("--masters", action="store_true", help="ours keeps float32 master weights")
    parser.add_argument("--memory-limit", type=float, metavar="GB")
    parser.add_argument("--only", choices=("ours", "theirs"))
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    import mlxlm.runtime  # before mlx

    backend = mlxlm.runtime.backend()
    names = {"ours": ["mlxlm"], "theirs": ["mlx-lm"]}.get(arguments.only or "", ["mlxlm", "mlx-lm"])
    if importlib.util.find_spec("mlx_lm") is None:
        names = [name for name in names if name != "mlx-lm"]
    same = ("shape", "length", "batch_size", "steps", "warmup", "recompute", "masters", "memory_limit")
    job = {name: getattr(arguments, name) for name in same}
    job["dtype"] = arguments.dtype or ("float32" if backend == "cpu" else "bfloat16")
    print(f"{backend}: {json.dumps(job)}, median of {arguments.repeats}", flush=True)
    print(f"{'':8}{'':10}{'s a step':>10}{'fastest':>10}{'tokens/s':>12}{'peak, GB':>10}", flush=True)
    for mode in arguments.mode:
        report(mode, names, job, arguments.repeats)


def report(mode: str, names: list[str], job: dict[str, Any], repeats: int) -> None:
    """Measure a mode and print its lines."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            measured = figures({**job, "mode": mode, "who": name}, environments()[name])
            if isinstance(measured, str):
                print(f"{mode:8}{name:10}{measured}", flush=True)
            else:
                found[name].append(measured)
                print(f"{mode:8}{name:10}steps in ms: {measured['steps']}", flush=True)
    speeds, peaks = {}, {}
    for name, each in found.items():
        if each:
            seconds = statistics.median(one["seconds"] for one in each)
            speeds[name], peaks[name] = job["batch_size"] * job["length"] / seconds, max(one["peak"] for one in each)
            fastest = min(one["fastest"] for one in each)
            line = f"{seconds:10.4f}{fastest:10.4f}{speeds[name]:12,.0f}{peaks[name] / 1e9:10.3f}"
            print(f"{mode:8}{name:10}{line}", flush=True)
    if len(speeds) == 2:
        speed, memory = (kind["mlxlm"] / kind["mlx-lm"] for kind in (speeds, peaks))
        print(f"{mode:8}{'ratio':10}{'':20}{speed:12.2f}{memory:10.2f}", flush=True)


if __name__ == "__main__":
    main()
