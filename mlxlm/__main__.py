"""The command `mlxlm`, also as `python -m mlxlm`. Imports wait until an interruption is one line and no traceback."""

from __future__ import annotations

import sys

from mlxlm.interruption import SAID


def main() -> None:
    """Run the command, see `mlxlm.cli.main.run`."""
    try:
        from mlxlm.cli.main import run

        run()
    except KeyboardInterrupt:
        print(SAID, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
