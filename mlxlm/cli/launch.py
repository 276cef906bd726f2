"""`mlxlm launch`: a command in several processes that share its work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

# The verbs that can share their work, and what they are given when they are started again.
SHARING: dict[str, tuple[str, ...]] = {
    "pretrain": ("--resume",), "finetune": ("--resume",), "align": ("--resume",), "generate": (), "chat": (),
    "evaluate": (),
}  # fmt: skip


def launch(
    command: Annotated[list[str], typer.Argument(metavar="VERB ...", help="A verb of mlxlm with its flags.")],
    processes: Annotated[
        int | None, typer.Option("--processes", "-n", help="How many; with --hostfile on each machine.")
    ] = None,
    hostfile: Annotated[
        str | None, typer.Option(metavar="FILE", help="Machines, as mlx.distributed_config writes them.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help="ring; between machines jaccl (Thunderbolt), mpi; of NVIDIA GPUs nccl."),
    ] = "ring",
    restarts: Annotated[int, typer.Option(help="How often to start again, resuming, when a process fails.")] = 0,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a process counts as hung.")] = None,
) -> None:
    """Run a verb in several processes: mlxlm launch -n 4 pretrain --config recipe.yaml --mesh dp=2,tp=2"""
    import os

    from mlxlm.distributed.hosts import BACKENDS, launch_on_hosts
    from mlxlm.distributed.launching import launch as start
    from mlxlm.errors import UsageError, nearest

    verb = command[0]
    if verb not in SHARING:
        raise UsageError(f"{verb!r} is no verb that several processes can share; these are: {', '.join(SHARING)}")
    known = ("ring", "nccl") if hostfile is None else BACKENDS
    if backend not in known:
        where = "processes of one machine" if hostfile is None else "machines of a host file"
        raise UsageError(f"--backend {backend}: {where} talk over {' or '.join(known)}{nearest(backend, known)}")
    if timeout is not None:
        if timeout <= 0:
            raise UsageError(f"--timeout {timeout:g}; expected more than 0")
        os.environ["MLXLM_TIMEOUT"] = str(timeout)
    words = [sys.executable, "-m", "mlxlm", *command]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if hostfile is not None:
        if restarts:
            raise UsageError("--restarts is for processes of one machine; on several, start again with --resume")
        raise typer.Exit(launch_on_hosts(words, Path(hostfile), count=processes, backend=backend, say=say))
    if processes is None:
        raise UsageError(
            f"say how many processes before the verb, as launch -n 2 {verb} ..., or name machines with --hostfile"
        )
    raise typer.Exit(start(words, processes, backend=backend, restarts=restarts, resume=SHARING[verb], say=say))
