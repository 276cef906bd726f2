"""`mlxlm launch --hostfile`: what mlx.launch is asked to do, and host files that can't be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from processes import ROOT

from mlxlm.distributed import hosts
from mlxlm.errors import UsageError

MACS = [{"ssh": "mac1.local", "ips": ["10.0.0.1"]}, {"ssh": "mac2.local", "ips": ["10.0.0.2"]}]
FAKE = """#!{python}
import json, sys
asked = sys.argv[1:]
json.dump([asked, json.load(open(asked[1]))], open({told!r}, "w"))
print({printed!r}, file=sys.stderr)
"""


def write(folder, value):
    path = folder / "hosts.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A function: what a stand-in of mlx.launch prints, and arguments -> its arguments, its host file, the status."""

    def run(printed, *arguments, **options):
        path, told = tmp_path / "mlx.launch", tmp_path / "told.json"
        path.write_text(FAKE.format(python=sys.executable, told=str(told), printed=printed))
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        status = hosts.launch_on_hosts(*arguments, say=lambda text: None, **options)
        return *json.loads(told.read_text()), status

    return run


def test_every_machine_gets_its_processes_and_our_settings(tmp_path, asked, monkeypatch):
    monkeypatch.setenv("MLXLM_TIMEOUT", "77")
    file = write(tmp_path, {"hosts": MACS, "envs": ["A=1"]})
    words, written, status = asked("", ["run", "me"], file, count=2, backend="ring")
    assert words[2:] == ["--backend", "ring", "--", "run", "me"]
    assert [host["ssh"] for host in written["hosts"]] == ["mac1.local"] * 2 + ["mac2.local"] * 2
    assert written["envs"][0] == "A=1"
    assert "MLXLM_TIMEOUT=77" in written["envs"]
    assert status == 0


@pytest.mark.parametrize(
    ("printed", "status"),
    [
        ("Node with rank 1 exited with code 75\nNode with rank 0 exited with code 2", 2),
        ("Node with rank 1 exited with code -9\nNode with rank 0 was killed", 137),
        ("Node with rank 1 was killed", 75),
    ],
)
def test_the_status_is_that_of_the_process_that_failed(tmp_path, asked, printed, status):
    assert asked(printed, ["x"], write(tmp_path, MACS), count=None, backend="ring")[2] == status


@pytest.mark.parametrize(
    ("content", "backend", "said"),
    [
        ("[]", "ring", "no host is there"),
        ("{}", "ring", "this is no list of hosts"),
        ("not JSON", "ring", "this is no list of hosts"),
        ([{"ips": ["10.0.0.1"]}], "ring", "host 1, .*has no name under ssh"),
        ([MACS[0], "mac2"], "ring", "host 2"),
        ([{"ssh": "mac1"}], "ring", "mac1, has no ips, which --backend ring needs"),
        (MACS, "jaccl", "has no rdma"),
        ({"backend": "jaccl", "hosts": MACS}, "ring", "is for the backend jaccl"),
    ],
)
def test_a_host_file_that_can_not_be_used_is_refused(tmp_path, content, backend, said):
    with pytest.raises(UsageError, match=said):
        hosts.launch_on_hosts(["x"], write(tmp_path, content), count=None, backend=backend, say=print)


def test_a_host_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="can't be read: No such file"):
        hosts.launch_on_hosts(["x"], tmp_path / "none.json", count=None, backend="ring", say=print)
    with pytest.raises(UsageError, match="at least 1 process"):
        hosts.launch_on_hosts(["x"], write(tmp_path, MACS), count=0, backend="ring", say=print)


@pytest.mark.slow
def test_two_local_entries_answer_together(tmp_path, tiny_directory):
    """mlx.launch starts processes of 127.0.0.1 without ssh."""
    file = write(tmp_path, [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2)
    words = ["generate", "--model", str(tiny_directory), "--prompt", "abc", "-m", "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}

    def run(*before, mesh=()):
        command = [sys.executable, "-m", "mlxlm", *before, *words, *mesh]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    alone, together = run(), run("launch", "--hostfile", str(file), "--", mesh=("--mesh", "pp=2"))
    assert (together.returncode, together.stdout) == (0, alone.stdout)
    assert run("launch", "--hostfile", str(file), "--", mesh=("--mesh", "tp=5")).returncode == 2
