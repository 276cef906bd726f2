"""What works, and how fast, between GPUs over NCCL: every operation, training against one process, speed.

usage: python tools/benchmarks/nccl.py [--backend nccl] [--processes 2] [--seconds 150] [--only NAME ...]

Starts one process a GPU with the environment that mlx.launch would give it and prints a row for each thing tried: its
name, "ok" or what is wrong, seconds, and a number. A row that hangs or fails ends its processes; new ones go on with
the next row. Rows that the time doesn't reach are said to be left out. With --backend ring it runs anywhere.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROW_LIMIT = float(os.environ.get("ROW_LIMIT", "60"))  # seconds of a row, kernels compiled for it included
PARITY = ["llama dp=2 0", "llama dp=2 1", "llama dp=2 2", "llama dp=2 3", "llama tp=2 0", "llama pp=2 0"]
SPEED = ["dp=2 0", "dp=2 1", "dp=2 3", "tp=2 0"]
# GPT-2's smallest shape, with LLaMA's layers.
SHAPE = {"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
         "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 50304, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": True}  # fmt: skip
ROWS, LENGTH, WARM, STEPS = 8, 1024, 3, 8


def rows() -> dict[str, Callable[[Any], str]]:
    """Everything that is tried, by name, in the order of what is most worth knowing."""
    found: dict[str, Callable[[Any], str]] = {f"comm {name}": functools.partial(face, name) for name in FACES}
    found |= {f"train {case}": functools.partial(parity, case, False) for case in PARITY}
    found |= {f"speed {case}": functools.partial(speed, case, False) for case in SPEED}
    found |= {f"train {case}, compiled": functools.partial(parity, case, True) for case in PARITY[:5]}
    found |= {f"speed {case}, compiled": functools.partial(speed, case, True) for case in SPEED}
    return found


# ---------------------------------------------------------------------------------------------------- in each process


def _mine(rank: int, shape: tuple[int, ...], kind: str = "float32") -> Any:
    """Small whole numbers, which every type adds up exactly."""
    import mlx.core as mx
    import numpy as np

    return mx.array(np.random.default_rng(rank).integers(-8, 9, shape).astype(np.float32)).astype(getattr(mx, kind))


def _sums(comm: Any) -> bool:
    import mlx.core as mx

    kinds = ("float32", "bfloat16", "float16", "int32", "uint32")
    shape = (3, 5)
    return all(
        bool(mx.array_equal(comm.sum(_mine(comm.index, shape, kind)),
                            sum(_mine(i, shape, kind) for i in range(comm.size))))
        for kind in kinds
    )  # fmt: skip


def _gathered(comm: Any) -> bool:
    import mlx.core as mx

    every = [_mine(i, (2, 3)) for i in range(comm.size)]
    stacked, joined = comm.stack(_mine(comm.index, (2, 3))), comm.gather(_mine(comm.index, (2, 3)), axis=1)
    bits = comm.stack(mx.array([comm.index, 255], dtype=mx.uint8))
    right = mx.array_equal(stacked, mx.stack(every)) and mx.array_equal(joined, mx.concatenate(every, axis=1))
    return bool(right) and bits.tolist() == [[i, 255] for i in range(comm.size)]


def _scattered(comm: Any) -> bool:
    import mlx.core as mx

    total = sum(_mine(i, (2 * comm.size, 7)) for i in range(comm.size))
    own = comm.reduce_scatter(_mine(comm.index, (2 * comm.size, 7)))
    return bool(mx.array_equal(own, total[2 * comm.index : 2 * comm.index + 2]))


def _broadcast(comm: Any) -> bool:
    import mlx.core as mx

    return bool(mx.array_equal(comm.broadcast(_mine(comm.index, (4, 4)), root=1), _mine(1, (4, 4))))


def _rotated(comm: Any) -> bool:
    import mlx.core as mx

    (got,) = comm.rotate([mx.full((3_000_000,), float(comm.index))])
    return bool(mx.all(got == (comm.index - 1) % comm.size))


def _agreed(comm: Any) -> bool:
    comm.agree("the same", "a text")
    return comm.world.texts(f"rank {comm.index}") == [f"rank {i}" for i in range(comm.size)]


FACES: dict[str, Callable[[Any], bool]] = {
    "sum": _sums, "gather": _gathered, "reduce-scatter": _scattered, "broadcast": _broadcast, "texts": _agreed,
    "point to point": _rotated, "subgroup": _sums, "64 MB": _sums,
}  # fmt: skip


def face(name: str, world: Any) -> str:
    """One operation of `Comm`, checked; of the large sum its speed too."""
    import mlx.core as mx

    comm = world.everyone
    if name == "subgroup":
        from mlxlm.distributed.communicator import Comm
        from mlxlm.distributed.world import SPLITS

        native = world.group.split(0, world.rank) if world.backend in SPLITS else None
        comm = Comm(world, tuple(range(world.size)), "split", native)
    right = FACES[name](comm)
    comm.barrier()
    if name != "64 MB":
        return "ok" if right else "WRONG"
    data, times = mx.ones((2**24,)), []
    for _ in range(5):
        mx.eval(data)
        comm.barrier()
        start = time.perf_counter()
        mx.eval(comm.sum(data))
        times.append(time.perf_counter() - start)
    return f"{'ok' if right else 'WRONG'} {data.nbytes / min(times) / 1e9:.2f} GB/s summed"


def parity(case: str, compiled: bool, world: Any) -> str:
    """Ten AdamW steps of a tiny model under a mesh against the same steps here alone: largest differences."""
    import numpy as np
    from mlx.utils import tree_flatten
    from small_models import small_model
    from training_cases import Batches, distance, trained

    from mlxlm.distributed import Joined, parse_mesh

    name, mesh, zero = case.split(" ")
    losses, alone = trained(name)
    whole = dict(tree_flatten(alone.model.parameters()))
    model = small_model(name)
    joined = Joined(world, parse_mesh(mesh, world.size), int(zero))
    parallel = joined.share_model(model)
    got, step = trained(name, parallel, model, joined.rows(Batches(model)), compile=compiled)
    far = max(distance(parallel.pieces[key], array, whole[key]) for key, array in step.parameters.items())
    apart = float(np.abs(got - losses).max())
    step.close()
    return f"{'ok' if max(far, apart) < 1e-5 else 'APART'} losses {apart:.1e}, weights {far:.1e}"


class Rows:
    """A source of the same random rows again and again.  count: of all processes together."""

    epoch = num_tokens = 0

    def __init__(self, count: int):
        self.count = count

    def next(self) -> Any:
        """All processes' rows of one batch."""
        import numpy as np

        drawn = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (self.count, LENGTH + 1)).astype(np.int32)
        return {"tokens": drawn[:, :-1], "targets": drawn[:, 1:]}


_alone: dict[bool, float] = {}


def speed(case: str, compiled: bool, world: Any) -> str:
    """Tokens a second of 125M weights under a mesh, of all processes, and by those of one that works alone."""
    mesh, zero = case.split(" ")
    if compiled not in _alone:
        _alone[compiled] = _rate(None, ROWS, compiled)
        world.everyone.barrier()
    from mlxlm.distributed import Joined, parse_mesh

    joined = Joined(world, parse_mesh(mesh, world.size), int(zero))
    rate = _rate(joined, ROWS * joined.mesh.dp, compiled)
    return f"ok {rate:.0f} tokens/s, alone {_alone[compiled]:.0f}: {rate / _alone[compiled]:.2f} times"


def _rate(joined: Any, count: int, compiled: bool) -> float:
    import mlx.core as mx

    from mlxlm.models import Transformer, family_of
    from mlxlm.training import Step, TrainSettings, WordLoss
    from mlxlm.training.initialisation import initialise

    model = Transformer(family_of(SHAPE).read_config(SHAPE))
    initialise(model, 0)
    settings = TrainSettings(steps=WARM + STEPS, dtype="bfloat16", compile=compiled)
    source = Rows(count)
    parallel = None if joined is None else joined.share_model(model)
    step = Step(model, WordLoss(), settings, parallel)
    source = source if joined is None else joined.rows(source)
    for number in range(WARM + STEPS):
        if number == WARM:
            mx.synchronize()
            start = time.perf_counter()
        step([source.next()], 1e-4)
        step.evaluate_state()
    mx.synchronize()
    seconds = time.perf_counter() - start
    step.close()
    return STEPS * count * LENGTH / seconds


def work(names: list[str]) -> None:
    """The rows of these names, one after another; the first process prints them."""
    sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / part) for part in ("", "distributed", "training"))]
    import mlxlm  # noqa: F401  before mlx.core
    from mlxlm.distributed import connect

    with connect(timeout=ROW_LIMIT) as world:
        known = rows()
        for name in names:
            start = time.perf_counter()
            with world.waiting(name):
                found = known[name](world)
                wrong = [text for text in world.texts(found, name) if not text.startswith("ok")]
            if world.rank == 0:
                print(f"{name}\t{wrong[0] if wrong else found}\t{time.perf_counter() - start:.1f} s", flush=True)
        world.everyone.barrier()


# ---------------------------------------------------------------------------------------------------- around them


def attempt(names: list[str], count: int, backend: str, ends: float) -> int:
    """How many of the rows new processes printed before they ended, by themselves or at the time `ends`."""
    from mlxlm.distributed.launching import environments

    done = 0
    # Products of float32 exactly; without NVLink multicast, which not every machine allows.
    ours = {"MLX_ENABLE_TF32": "0", "NCCL_NVLS_ENABLE": "0"}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", *names],
                env={**environment, **ours}, stdout=subprocess.PIPE if rank == 0 else None, text=True,
            )
            for rank, environment in enumerate(environments(count, backend, Path(folder)))
        ]  # fmt: skip
        stop = threading.Timer(max(0.1, ends - time.monotonic()), lambda: [one.kill() for one in processes])
        stop.start()
        try:
            for line in processes[0].stdout or ():
                name, _, rest = line.rstrip("\n").partition("\t")
                if name in names:
                    done += 1
                    print(f"{name:32}{rest}".replace("\t", "  "), flush=True)
            for process in processes:
                process.wait()
        finally:
            stop.cancel()
            for process in processes:
                process.kill()
                process.wait()
    return done


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="nccl", choices=("nccl", "ring"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="Rows whose name begins so.")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return
    sys.path.insert(0, str(ROOT))
    ends = time.monotonic() + given.seconds - 5
    left = [name for name in rows() if not given.only or name.startswith(tuple(given.only))]
    while left and time.monotonic() < ends - 5:
        left = left[attempt(left, given.processes, given.backend, ends) :]
        if left and time.monotonic() < ends - 5:
            print(f"{left[0]:32}FAILED: see above", flush=True)
            left = left[1:]
    if left:
        print(f"left out, for want of time: {', '.join(left)}")


if __name__ == "__main__":
    main()
