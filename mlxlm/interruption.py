"""Ctrl-C while the command `mlxlm` starts is one line, and no traceback of whatever was being imported.

Imported before anything that takes long; programs that use the package as a library are left alone.
"""

from __future__ import annotations

import sys
from types import TracebackType

SAID = "interrupted"


def is_command(program: str) -> bool:
    """Whether a program, as `sys.argv` calls it, is the command; `python -m` has no name yet when this is imported."""
    return program == "-m" or program.replace("\\", "/").rpartition("/")[2].removesuffix(".exe") == "mlxlm"


def one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception that nothing catches: a line for Ctrl-C, all that Python says for others."""
    if issubclass(kind, KeyboardInterrupt):
        print(SAID, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if is_command((sys.argv or [""])[0]):
    sys.excepthook = one_line
