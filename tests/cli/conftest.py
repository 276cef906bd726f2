"""What the tests of the command line share."""

from __future__ import annotations

import io
import sys

import pytest

from mlxlm.cli import main


@pytest.fixture
def mlxlm_command(monkeypatch, capsys):
    """A function: arguments -> (exit status, stdout, stderr) of the command, run in this process."""

    def command(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["mlxlm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        status = 0
        try:
            main.run()
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command
