"""The curves of runs, read from their metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxlm.errors import TrainingError, UsageError
from mlxlm.training.reporters import read_metrics

# Key in metrics.jsonl -> title.
CURVES = {
    "loss": "training loss",
    "valid_loss": "validation loss",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}


@dataclass(frozen=True)
class Run:
    """A run's name and curves: by key of `CURVES` a list of (step, value), finite values only.

    last: the last row of metrics.jsonl that has each key, for a table.
    """

    name: str
    curves: dict[str, list[tuple[int, float]]]
    last: dict[str, float]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in some folders, each with a name of its own.

    Raises TrainingError for a folder without metrics, UsageError when none is given.
    """
    if not folders:
        raise UsageError("no runs to plot; give the folder of at least one")
    return [_read(Path(folder), name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read(folder: Path, name: str) -> Run:
    rows = read_metrics(folder)
    curves: dict[str, list[tuple[int, float]]] = {}
    last: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                continue
            last[key] = value
            if key in CURVES:
                curves.setdefault(key, []).append((row["step"], float(value)))
    if not curves:
        raise TrainingError(f"{folder} has no metrics to plot yet")
    return Run(name, curves, last)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """Last parts of the paths, as many as tell them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UsageError("the same run is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def plot_images(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """loss.png, learning_rate.png and throughput.png in a folder. Raises UsageError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("PNG files need matplotlib: pip install matplotlib (the HTML page needs nothing)") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, keys in _IMAGES.items():
        figure = Figure(figsize=(8, 4.5), dpi=120)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            for key in keys:
                points = run.curves.get(key)
                if points:
                    label = f"{run.name}: {CURVES[key]}" if len(keys) > 1 else run.name
                    steps, values = zip(*points, strict=True)
                    dashes = "--" if key == "valid_loss" else "-"
                    marker = "o" if len(points) <= _MARKED else None
                    axes.plot(steps, values, dashes, color=f"C{number % 10}", label=label, marker=marker, markersize=4)
        axes.set_title(name.replace("_", " "))
        if name == "throughput":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("step")
        axes.set_ylabel("loss" if name == "loss" else CURVES[keys[0]])
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1])
    return files


_MARKED = 30  # lines of at most so many points show each of them
_IMAGES = {"loss": ("loss", "valid_loss"), "learning_rate": ("learning_rate",), "throughput": ("tokens_per_second",)}
