"""What the script for NVIDIA GPUs says of a run, with a program and tools that only pretend."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tools.metal_emulator import run_on_nvidia

RIGHT = np.array([1.0, -4.0, np.inf], dtype=np.float32)


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A function: what the GPU writes, and what each sanitizer prints -> exit status of a run of one dispatch."""
    folder, tools = tmp_path / "export", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    entry = {"name": "out", "type": "float", "bytes": 12, "offset": 0, "exact": 0, "writable": True}
    dispatch = {"kernel": "k000", "what": "forward", "case": "plain", "dtype": "float32", "arguments": [entry]}
    (folder / "index.json").write_text(json.dumps([dispatch | {"grid": [64, 2, 1], "threadgroup": [32, 1, 1]}]))
    (folder / "data.bin").write_bytes(RIGHT.tobytes())
    (folder / "k000.cu").touch()

    def script(name: str, text: str) -> Path:
        path = tools / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    script("nvidia-smi", "echo 'A GPU, 1.2'")
    script("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.1'")
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(run_on_nvidia, "_build", lambda folder, jobs: program)
    program = script("program", 'cp "$(dirname "$2")/written" "$3"')

    def run(written: np.ndarray, said: dict[str, str] | None = None) -> int:
        (folder / "written").write_bytes(written.astype(np.float32).tobytes())
        for_tool = "\n".join(f'[ "$2" = {tool} ] && echo "{line}"' for tool, line in (said or {}).items())
        script("compute-sanitizer", f'{for_tool}\nshift 2\nexec "$@"')
        return run_on_nvidia.run(folder, sanitize=said is not None, jobs=1)

    run.folder = folder
    return run


CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed",
}


def test_one_table_says_it_all(pretended, capsys):
    assert pretended(RIGHT * np.float32(1 + 2**-19), CLEAN) == 0
    out = capsys.readouterr().out
    assert "A GPU, 1.2, CUDA 13.0\n1 cases, 1 kernels, 1 dispatches" in out
    rows = [line.split() for line in out.splitlines() if line]
    assert rows[-4] == ["forward", "float32", "1", "1.9e-06", "1.9e-06"]
    assert rows[-3][:6] == ["memcheck", "all", "1", "0", "errors,", rows[-3][5]]
    assert rows[-2][:5] == ["racecheck", "all", "1", "0", "hazards"]
    assert rows[-1] == ["all", "good"]
    assert (pretended.folder / "list.txt").read_text() == "0 2 2 1 32 1 1 1 12 0 1\n"


@pytest.mark.parametrize("wrong", [RIGHT * 1.001, [1.0, np.nan, np.inf], [1.0, -4.0, 4.0], RIGHT[:2]], ids=str)
def test_wrong_outputs_fail(pretended, wrong, capsys):
    assert pretended(np.asarray(wrong)) == 1
    assert "BAD" in capsys.readouterr().out


@pytest.mark.parametrize("said", [
    CLEAN | {"racecheck": "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"},
    CLEAN | {"memcheck": "========= ERROR SUMMARY: 10 errors"},
    CLEAN | {"memcheck": "no such device"},
], ids=["race", "memory", "no verdict"])  # fmt: skip
def test_what_a_sanitizer_reports_fails(pretended, said, capsys):
    assert pretended(RIGHT, said) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_folder_without_an_export_is_told_of(tmp_path):
    with pytest.raises(SystemExit, match="holds no export"):
        run_on_nvidia.run(tmp_path, sanitize=False, jobs=1)


def test_it_takes_one_command(monkeypatch):
    steps = []
    monkeypatch.setattr(run_on_nvidia, "export", lambda folder: steps.append(folder))
    monkeypatch.setattr(run_on_nvidia, "run", lambda folder, **_: steps.append(folder) or 0)
    monkeypatch.setattr(sys, "argv", ["run_on_nvidia.py"])
    assert run_on_nvidia.main() == 0
    assert steps == [run_on_nvidia.ROOT / "build" / "nvidia"] * 2
