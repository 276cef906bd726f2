"""`mlxlm plot`: curves of training runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlxlm.errors import UsageError


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs (each holds a metrics.jsonl).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path("plots"),
    images: Annotated[
        bool | None, typer.Option("--png/--no-png", help="PNG files too; default when matplotlib is installed.")
    ] = None,
) -> None:
    """Compare runs: loss, learning rate and throughput as PNG files and as one self-contained HTML page.

    Prints the paths of what it wrote.
    """
    from mlxlm.training.curves import plot_images, read_runs
    from mlxlm.training.page import write_page

    found = read_runs(runs)
    files = [write_page(found, output / "runs.html")]
    if images is not False:
        try:
            files += plot_images(found, output)
        except UsageError as error:
            if images:
                raise
            print(f"no PNG files: {error}", file=sys.stderr)
    print(*files, sep="\n")
