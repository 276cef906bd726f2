"""Steps under meshes of local processes against the plan's cost model, and what the model says of many machines.

usage: python tools/benchmarks/scaling.py [--processes 1 2 4] [--steps 5] [--repeats 3] [--machines 8 64 256]
           [--memory 64GB] [--tflops 10]

Measures training steps of a tiny decoder in one process, then on each mesh of 2 and 4 processes of this machine. The
speed of arithmetic is fitted to the step of one process, latency and bandwidth to sums and sends of two sizes in the
same run with as many processes; the model then predicts the other steps. Processes that share cores are taken to share
their speed. Then it prints, for a decoder of a billion weights, the best mesh of many machines by the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MESHES = {
    1: ["dp=1 0"],
    2: ["dp=2 0", "dp=2 3", "tp=2 0", "pp=2 0", "sp=2 0"],
    4: ["dp=4 0", "dp=2,tp=2 0", "pp=2,tp=2 0"],
}
ROWS, LENGTH, BATCHES = 4, 128, 2
SMALL, LARGE = 2**12, 2**22  # bytes of the messages that latency and bandwidth are fitted to
TINY = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True}  # fmt: skip
BILLION = {**TINY, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip


def config_of(values: dict[str, Any]) -> Any:
    """The model's configuration."""
    from mlxlm.models import family_of

    return family_of(values).read_config(values)


def plan_settings() -> Any:
    """What the plan is asked about the tiny model."""
    from mlxlm.training.plan import PlanSettings

    return PlanSettings(batch_size=ROWS, length=LENGTH, accumulation=BATCHES)


class Rows:
    """A source of the same random rows again and again."""

    epoch = num_tokens = 0

    def next(self) -> Any:
        """All processes' rows of one batch."""
        import numpy as np

        rows = np.random.default_rng(0).integers(0, TINY["vocab_size"], (ROWS, LENGTH + 1)).astype(np.int32)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def work(job: dict[str, Any]) -> None:
    """What each process does; the first writes seconds by mesh and by size of message."""
    from mlxlm.distributed import Mesh, connect

    with connect(timeout=120) as world:
        found: dict[str, Any] = {"steps": {text: seconds_of_step(world, text, job["steps"]) for text in job["meshes"]}}
        if world.size > 1:
            comm = world.comm(Mesh(dp=world.size).groups("dp"), "messages")
            found["sum"] = {size: seconds_of_message(world, comm, "sum", size) for size in (SMALL, LARGE)}
            found["send"] = {size: seconds_of_message(world, comm, "send", size) for size in (SMALL, LARGE)}
        world.everyone.barrier()
        if world.rank == 0:
            Path(job["out"]).write_text(json.dumps(found))


def seconds_of_step(world: Any, text: str, steps: int) -> float:
    """The median of so many steps under a mesh, after one that warms up."""
    from mlxlm.distributed import Joined, parse_mesh
    from mlxlm.models import Transformer
    from mlxlm.training import Step, TrainSettings, WordLoss
    from mlxlm.training.initialisation import initialise

    mesh, zero = text.split(" ")
    model = Transformer(config_of(TINY))
    initialise(model, 0)
    joined = Joined(world, parse_mesh(mesh, world.size), int(zero))
    settings = TrainSettings(steps=steps + 1, accumulation=BATCHES, compile=False)
    step = Step(model, WordLoss(), settings, joined.share_model(model))
    source, times = joined.rows(Rows()), []
    for _ in range(steps + 1):
        batches = [source.next() for _ in range(BATCHES)]
        world.everyone.barrier()
        start = time.perf_counter()
        step(batches, 1e-4)
        step.evaluate_state()
        times.append(time.perf_counter() - start)
    step.close()
    return statistics.median(times[1:])


def seconds_of_message(world: Any, comm: Any, operation: str, size: int) -> float:
    """The least of 7 sums over all, or of sends from each to the next: whatever else the machine does only adds."""
    import mlx.core as mx

    data, times = mx.ones((size // 4,)), []
    for _ in range(7):
        mx.eval(data)
        world.everyone.barrier()
        start = time.perf_counter()
        mx.eval(comm.sum(data) if operation == "sum" else comm.rotate([data]))
        times.append(time.perf_counter() - start)
    return min(times)


def run(count: int, steps: int) -> dict[str, Any]:
    """What `count` processes measured."""
    from mlxlm.distributed.launching import launch

    with tempfile.TemporaryDirectory() as folder:
        job = {"out": str(Path(folder) / "out.json"), "meshes": MESHES[count], "steps": steps}
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        if count == 1:
            status = subprocess.run(command, check=False).returncode
        else:
            status = launch(command, count, say=lambda text: print(text, file=sys.stderr))
        if status:
            raise SystemExit(f"{count} processes ended with status {status}")
        return json.loads(Path(job["out"]).read_text())


def fitted(times: dict[str, float], share: float) -> Any:
    """The link of two messages, of which a rank sends this share; without a bandwidth where the large took no longer,
    as it may on a busy machine.
    """
    from mlxlm.training.plan_machines import Link

    small, large = (times[str(size)] for size in (SMALL, LARGE))
    if large <= small:
        return Link(math.inf, large)
    bandwidth = share * (LARGE - SMALL) / (large - small)
    return Link(bandwidth, max(small - share * SMALL / bandwidth, 0.0))


def predicted_seconds(text: str, count: int, speed: float, links: dict[str, Any]) -> tuple[float, float]:
    """Arithmetic, and communication of each kind at the link that was measured for it, with a pipeline's waiting."""
    from mlxlm.distributed import parse_mesh
    from mlxlm.training.plan_mesh import Layout
    from mlxlm.training.plan_traffic import predict_mesh

    mesh, zero = text.split(" ")
    plan = predict_mesh(config_of(TINY), plan_settings(), Layout(mesh=parse_mesh(mesh, count), zero=int(zero)))
    found = []
    for rank in plan:
        times = {True: 0.0, False: 0.0}
        for one in rank.traffic:
            link = links["send" if one.operation == "send" or one.ranks < count else "sum"]
            times[one.in_batch] += one.calls * link.latency + one.sent / link.bandwidth
        stretch = 1 + (len(plan) - 1) / BATCHES
        found.append((rank.operations / speed * stretch, times[True] * stretch + times[False]))
    return max(found, key=sum)


def compare(counts: list[int], steps: int, repeats: int) -> None:
    """Print measured and predicted seconds of steps here."""
    print(f"tiny decoder, {ROWS} rows of {LENGTH} tokens, {BATCHES} batches a step, float32; {os.cpu_count()} cores")
    rounds = [{count: run(count, steps) for count in counts} for _ in range(repeats)]  # interleaved
    alone = statistics.median(one[1]["steps"]["dp=1 0"] for one in rounds)
    from mlxlm.distributed import Mesh
    from mlxlm.training.plan_mesh import Layout
    from mlxlm.training.plan_traffic import predict_mesh

    speed = predict_mesh(config_of(TINY), plan_settings(), Layout(mesh=Mesh()))[0].operations / alone
    print(f"fitted: {speed / 1e9:.1f} GFLOP/s, {alone / (ROWS * LENGTH * BATCHES) * 1e6:.0f} us a token")
    print("| processes | mesh, zero | measured s | (least, most) | predicted s | communication | predicted/measured |")
    print("|---|---|---|---|---|---|---|")
    for count in counts:
        links = {}
        for name in ("sum", "send") if count > 1 else ():
            times = {str(n): min(one[count][name][str(n)] for one in rounds) for n in (SMALL, LARGE)}
            links[name] = fitted(times, 2 * (count - 1) / count if name == "sum" else 1.0)
        for text in MESHES[count]:
            seen = [one[count]["steps"][text] for one in rounds]
            slower = max(1.0, count / (os.cpu_count() or 1))
            arithmetic, talking = predicted_seconds(text, count, speed / slower, links)
            total, median = arithmetic + talking, statistics.median(seen)
            print(f"| {count} | {text} | {median:.3f} | ({min(seen):.3f}, {max(seen):.3f}) | {total:.3f} | "
                  f"{talking:.3f} | {total / median:.2f} |")  # fmt: skip
        for name, link in links.items():
            print(f"{count} processes, {name}: {link.bandwidth / 1e6:.0f} MB/s, {link.latency * 1e3:.2f} ms a message")


def extrapolate(counts: list[int], memory: str, tflops: float) -> None:
    """Print the best mesh of many machines for a billion weights by the model alone."""
    from mlxlm.training.plan import PlanSettings, readable
    from mlxlm.training.plan_machines import LINKS, USABLE, Machines, bytes_of, recommend

    latencies = ", ".join(f"{name} {link.latency * 1e6:g} us" for name, link in LINKS.items())
    print(f"\nExtrapolated, not measured: 1.2 billion weights, bfloat16 with float32 masters, AdamW, 8 rows of 2,048"
          f" tokens a machine and update; {tflops:g} TFLOP/s reached on each; {USABLE:.0%} of {memory}; nominal speed"
          f" of the links, full for every pair at once; latencies {latencies}; nothing hidden behind arithmetic; no"
          " stragglers, no failures, no reading of data. Efficiency: against one machine's arithmetic without"
          " recomputing.")  # fmt: skip
    print("| machines | link | mesh | s/step | arithmetic | communication | waiting | memory | sent | efficiency |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    from mlxlm.distributed import Mesh
    from mlxlm.training.plan_mesh import Layout
    from mlxlm.training.plan_traffic import predict_mesh

    config = config_of(BILLION)
    for count in counts:
        settings = PlanSettings(batch_size=8 * count, length=2048, dtype="bfloat16")
        ideal = predict_mesh(config, PlanSettings(batch_size=8, length=2048, dtype="bfloat16"), Layout(mesh=Mesh()))
        for link in ("ethernet10", "thunderbolt5"):
            machines = Machines(count=count, memory=bytes_of(memory), link=LINKS[link], speed=tflops * 1e12)
            found = recommend(config, settings, machines)
            if not found.fitting:
                print(f"| {count} | {link} | none: {found.others[0][1]} |||||||||")
                continue
            best, t = found.fitting[0], found.fitting[0].time
            print(f"| {count} | {link} | {best.layout} | {t.total:.1f} | {t.arithmetic:.1f} | {t.communication:.1f} | "
                  f"{t.waiting:.1f} | {readable(best.peak)} | {readable(int(best.sent))} | "
                  f"{ideal[0].operations / machines.speed / t.total:.0%} |")  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], choices=MESHES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--machines", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--memory", default="64GB")
    parser.add_argument("--tflops", type=float, default=10.0)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return
    compare(sorted({1, *given.processes}), given.steps, given.repeats)
    extrapolate(given.machines, given.memory, given.tflops)


if __name__ == "__main__":
    main()
