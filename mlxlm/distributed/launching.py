"""Starting the processes of a run on one machine; hosts.py does it on several."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from mlxlm.errors import DistributedError, UsageError

# Seconds that the others have to end by themselves after one has, and then after SIGTERM, before they are killed.
GRACE = 10.0
_USER_MISTAKE = 2

Say = Callable[[str], None]


def launch(
    command: Sequence[str],
    count: int,
    *,
    backend: str = "ring",
    restarts: int = 0,
    resume: Sequence[str] = (),
    say: Say,
) -> int:
    """Run a command in `count` processes of this machine that find each other; their exit status.

    backend: "ring", or "nccl", where each has an NVIDIA GPU of its own.

    The first process has the terminal; what others write to stderr comes with their rank before it. When one ends with
    an error, all are ended, within a bounded time. Then they are started again, up to `restarts` times, with the
    arguments `resume` added, unless the cause was a mistake of the user's. SIGINT and SIGTERM are passed on.
    """
    if count < 1:
        raise UsageError(f"{count} processes; expected at least 1")
    if restarts < 0:
        raise UsageError(f"--restarts {restarts}; expected 0 or more")
    again = [word for word in resume if word not in command]
    for attempt in range(restarts + 1):
        status, reason, stopped = _attempt([*command, *(again if attempt else [])], count, backend)
        if attempt and again and status == _USER_MISTAKE and not stopped:
            say("there is nothing to go on from; starting from the beginning")
            status, reason, stopped = _attempt(command, count, backend)
        if status in (0, _USER_MISTAKE) or stopped:
            return status
        say(f"the run ended: {reason}")
        if attempt == restarts:
            return status
        say(f"starting again, {restarts - attempt - 1} more times at most")
    raise AssertionError("a loop over at least one attempt ends in it")


def _attempt(command: Sequence[str], count: int, backend: str) -> tuple[int, str, bool]:
    """Exit status, which rank ended how, and whether a signal to this process ended the run."""
    with tempfile.TemporaryDirectory(prefix="mlxlm-launch-") as folder:
        processes = [_start(command, rank, one) for rank, one in enumerate(environments(count, backend, Path(folder)))]
        readers = [
            threading.Thread(target=_prefixed, args=(rank, process.stderr), daemon=True)
            for rank, process in enumerate(processes)
            if process.stderr is not None
        ]
        for reader in readers:
            reader.start()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        got: list[int] = []

        def pass_on(number: int, frame: object) -> None:
            got.append(number)
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)

        for number in before:
            signal.signal(number, pass_on)
        try:
            return *_watch(processes), bool(got)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _end(processes)
            for reader in readers:
                reader.join(timeout=2)
            for process in processes:
                if process.stderr is not None:
                    process.stderr.close()


def environments(count: int, backend: str, folder: Path) -> list[dict[str, str]]:
    """The environment of each process of a run on this machine, as mlx.launch would set it.

    backend: see `launch`.  folder: for what they read.  Raises UsageError for more processes than there are GPUs that
    may be used.
    """
    names = ("MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "NCCL_HOST_IP", "MLX_HOSTFILE")
    common = {name: value for name, value in os.environ.items() if name not in names}
    if backend == "ring":
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
        return [{**common, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(count)]
    allowed = common.get("CUDA_VISIBLE_DEVICES")
    devices = [str(rank) for rank in range(count)] if not allowed else allowed.split(",")
    if len(devices) < count:
        raise UsageError(f"{count} processes need a GPU each, and CUDA_VISIBLE_DEVICES names {len(devices)}")
    common |= {
        "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(free_ports(1)[0]), "MLX_WORLD_SIZE": str(count),
    }  # fmt: skip
    return [{**common, "MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": devices[rank]} for rank in range(count)]


def _start(command: Sequence[str], rank: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(command),
        env=environment,
        stdin=None if rank == 0 else subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else subprocess.PIPE,
        # Ctrl-C reaches this process alone, which passes it on once.
        start_new_session=True,
        text=True,
        errors="replace",
    )


def _watch(processes: Sequence[subprocess.Popen[str]]) -> tuple[int, str]:
    """Wait until all have ended; when one fails, end the others. Status and cause of the first that failed."""
    first: tuple[int, int] | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if first is None and process.poll():
                first, deadline = (rank, process.returncode), time.monotonic() + GRACE
        if time.monotonic() > deadline:
            _end(processes)
        time.sleep(0.05)
    failed = [(rank, process.returncode) for rank, process in enumerate(processes) if process.returncode]
    if not failed:
        return 0, ""
    # A rank that only noticed the end of another says so by its status; the cause is one that didn't.
    noticed = DistributedError.exit_status
    causes = [one for one in failed if one[1] != noticed] or [first or failed[0]]
    rank, status = first if first in causes else causes[0]
    if status < 0:
        return 128 - status, f"rank {rank} was ended by {signal.Signals(-status).name}"
    return status, f"rank {rank} ended with status {status}"


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)  # one that was stopped could not end
                process.send_signal(number)
        ends = time.monotonic() + GRACE / 2
        while time.monotonic() < ends and any(process.poll() is None for process in processes):
            time.sleep(0.05)


def _prefixed(rank: int, stream: IO[str]) -> None:
    for line in stream:
        print(f"[{rank}] {line}", end="", file=sys.stderr, flush=True)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
