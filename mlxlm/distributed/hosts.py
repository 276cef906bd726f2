"""Starting the processes of a run on several machines: a host file, handed to mlx.launch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxlm.distributed.launching import Say, free_ports
from mlxlm.errors import DistributedError, UsageError

BACKENDS = ("ring", "jaccl", "mpi")
_LOCAL = "127.0.0.1"  # what mlx.launch starts without ssh
_NEEDS = {"ring": "ips", "jaccl": "rdma"}
_EXPECTED = (
    "expected a JSON list of hosts as mlx.distributed_config writes it, such as "
    '[{"ssh": "mac1.local", "ips": ["10.0.0.1"]}]'
)
_ENDED = re.compile(r"Node with rank (\d+) (?:exited with code (-?\d+)|was (killed))")


def read_hosts(hostfile: Path, backend: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The machines of a host file of mlx.launch, and the environment variables that it sets.

    Raises UsageError for a file that can't be read or has another form, and for hosts that lack what a backend needs.
    """
    try:
        given = json.loads(hostfile.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{hostfile} can't be read: {error.strerror}") from None
    except ValueError:
        given = None
    listed = given.get("hosts") if isinstance(given, dict) else given
    if not isinstance(listed, list) or not listed:
        problem = "no host is there" if listed == [] else "this is no list of hosts"
        raise UsageError(f"{hostfile}: {problem}; {_EXPECTED}")
    for number, host in enumerate(listed, 1):
        if not isinstance(host, dict) or not isinstance(host.get("ssh"), str) or not host["ssh"]:
            raise UsageError(f"{hostfile}: host {number}, {json.dumps(host)}, has no name under ssh; {_EXPECTED}")
        needed = _NEEDS.get(backend)
        if needed is not None and not host.get(needed):
            raise UsageError(
                f"{hostfile}: host {number}, {host['ssh']}, has no {needed}, which --backend {backend} needs; "
                f"mlx.distributed_config --backend {backend} finds them"
            )
    said = given.get("backend") if isinstance(given, dict) else None
    if said and said.partition("-")[0] != backend:
        raise UsageError(f"{hostfile} is for the backend {said}; give --backend {said} or another file")
    return listed, list(given.get("envs", [])) if isinstance(given, dict) else []


def launch_on_hosts(command: Sequence[str], hostfile: Path, *, count: int | None, backend: str, say: Say) -> int:
    """Run a command on the machines that a host file of mlx.launch names; the exit status of the first that fails.

    count: processes on each machine, default 1.  backend: "ring", "jaccl" (Thunderbolt RDMA) or "mpi".
    Every machine must have this Python with mlxlm at the same path, and see the run's folder.
    Raises UsageError as `read_hosts` does, and without mlx.launch.
    """
    hosts, variables = read_hosts(hostfile, backend)
    if count is not None and count < 1:
        raise UsageError(f"-n {count}: a machine has at least 1 process")
    beside = Path(sys.executable).with_name("mlx.launch")
    launcher = str(beside) if beside.is_file() else shutil.which("mlx.launch")
    if launcher is None:
        raise UsageError("mlx.launch is not there; it comes with MLX: pip install mlx")
    # mlx.launch repeats hosts that are named on its command line, but not those of a file.
    every = [host for host in hosts for _ in range(count or 1)]
    ours = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("MLXLM_")]
    with tempfile.TemporaryDirectory(prefix="mlxlm-hosts-") as folder:
        file = Path(folder) / "hosts.json"
        file.write_text(json.dumps({"backend": backend, "envs": [*variables, *ours], "hosts": every}))
        words = [launcher, "--hostfile", str(file), "--backend", backend]
        if backend == "ring" and all(host["ssh"] == _LOCAL for host in hosts):
            words += ["--starting-port", str(free_ports(1)[0])]
        machines = f"{len(hosts)} host{'s' * (len(hosts) > 1)}"
        say(f"starting {len(every)} processes on {machines} over {backend}: {' '.join(command)}")
        return _status([*words, "--", *command])


def _status(words: Sequence[str]) -> int:
    """The status of a run of mlx.launch, which itself says in its output alone how its processes ended."""
    # Its standard input stays open and empty: of one at its end it would read again and again.
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    assert process.stdin is not None
    statuses: list[int] = []
    with process.stdin, process.stderr:
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            found = _ENDED.search(line)
            if found is not None:
                statuses.append(DistributedError.exit_status if found[3] else int(found[2]))
        process.wait()
    # Ranks that only noticed the end of another say so by their status; the cause is one that didn't.
    failed = [one for one in statuses if one]
    causes = [one for one in failed if one != DistributedError.exit_status] or failed
    if not causes:
        return process.returncode
    return causes[0] if causes[0] > 0 else 128 - causes[0]
