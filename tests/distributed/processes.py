"""Starting real processes on this machine that form a world over the ring backend, with a hard time limit.

    results = run_ranks(2, "communication_cases", "collectives")      # one dict of arrays a rank

runs `collectives(world, folder, *arguments)` of tests/distributed/communication_cases.py in each of them.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_ports(count):
    """Ports nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def environments(count, folder, timeout=20):
    """What each rank needs in its environment."""
    hosts = Path(folder) / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    for rank in range(count):
        yield {
            **os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "MLXLM_TIMEOUT": str(timeout),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), str(HERE.parent), str(HERE.parent / "training")]),
            "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip


def start_ranks(count, module, function, *arguments, folder, timeout=20):
    """The processes, started."""
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, module, function, str(folder), *map(str, arguments)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for environment in environments(count, folder, timeout)
    ]  # fmt: skip


def finish(processes, limit):
    """Exit statuses and what was written to stderr; whoever isn't done within `limit` seconds is killed."""
    statuses, errors = [], []
    try:
        for process in processes:
            _, error = process.communicate(timeout=limit)
            statuses.append(process.returncode)
            errors.append(error)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()
    return statuses, errors


def start_under_mpi(count, module, function, *arguments, folder, timeout=20):
    """The one process that starts the others: the mpirun of OpenMPI on the path, whose libraries lie beside it."""
    program = Path(shutil.which("mpirun"))
    environment = {
        **next(environments(count, folder, timeout)), "MLX_MPI_LIBNAME": "libmpi.so.40",
        "LD_LIBRARY_PATH": str(program.parent.parent / "lib"),
    }  # fmt: skip
    del environment["MLX_HOSTFILE"], environment["MLX_RANK"]
    words = [sys.executable, "-W", "error", __file__, module, function, str(folder), *map(str, arguments)]
    return [
        subprocess.Popen(
            [str(program), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(count), *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
    ]  # fmt: skip


def run_ranks(count, module, function, *arguments, limit=60, prepare=lambda folder: None, start=start_ranks):
    """What the function gave on each rank, dicts of numpy arrays. Fails when a rank does.

    prepare: called with the ranks' folder before they start.  start: how.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        statuses, errors = finish(start(count, module, function, *arguments, folder=folder), limit)
        assert not any(statuses), "\n".join(errors)
        results = []
        for rank in range(count):
            with np.load(Path(folder) / f"{rank}.npz") as file:
                results.append(dict(file))
        return results


def main():
    module, function, folder, *arguments = sys.argv[1:]
    import mlxlm  # noqa: F401  before mlx.core, so that a fast BLAS can be loaded
    from mlxlm.distributed import connect
    from mlxlm.errors import MlxlmError

    try:
        with connect() as world:
            result = getattr(importlib.import_module(module), function)(world, Path(folder), *arguments)
            np.savez(Path(folder) / f"{world.rank}.npz", **{k: np.array(v) for k, v in (result or {}).items()})
            world.everyone.barrier()
    except MlxlmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
