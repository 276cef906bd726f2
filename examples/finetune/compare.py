"""All methods on one task: quality against trainable parameters, time and memory.

    python examples/finetune/make_data.py --output runs/snippets
    python examples/finetune/compare.py
    python examples/finetune/compare.py --methods lora ia3 -- --iters 20

The second runs every method that has no result yet. What follows -- goes to mlxlm finetune. Each method runs by its own
file, in a process of its own, so that its peak memory is its own. Prints a table and writes
runs/finetune/compare.png (needs matplotlib: pip install "mlxlm-kit[plot]").
"""

from __future__ import annotations

# %% What there is to compare: one file a method
import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METHODS = sorted(path.stem for path in HERE.glob("*.yaml"))
MARKERS = "osD^v<>Pp*hXd8"
AXES = {"trainable": "trainable parameters", "seconds": "training time, s", "peak_memory": "peak memory, GB"}


# %% Run what has no result yet
def run(method: str, folder: Path, more: list[str]) -> dict[str, Any] | None:
    """The results of a method, from its folder or a run; None when the run fails."""
    target = folder / method
    if not (target / "results.json").is_file():
        print(f"== {method}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "mlxlm", "finetune", "--config", str(HERE / f"{method}.yaml")]
        done = subprocess.run([*command, "--adapter-path", str(target), *more], stdout=subprocess.DEVNULL)
        if done.returncode:
            print(f"{method} failed with status {done.returncode}", file=sys.stderr)
            return None
    return json.loads((target / "results.json").read_text(encoding="utf-8"))


def quality(results: dict[str, Any]) -> float:
    """Accuracy on the test rows; of runs without labels the share of right answers."""
    measures = results["test"] or results["valid"]
    return measures["accuracy"] if "accuracy" in measures else measures["exact_match"]


# %% The table
def table(found: dict[str, dict[str, Any]]) -> str:
    """One line a method, best first."""
    lines = [f"{'method':18}{'quality':>9}{'trainable':>12}{'share':>9}{'time, s':>9}{'memory, GB':>12}"]
    for name, results in sorted(found.items(), key=lambda item: -quality(item[1])):
        share = results["trainable"] / results["parameters"]
        lines.append(
            f"{name:18}{quality(results):9.1%}{results['trainable']:12,}{share:9.2%}{results['seconds']:9.0f}"
            f"{results['peak_memory'] / 1e9:12.2f}"
        )
    return "\n".join(lines)


# %% The picture
def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Quality against each of the axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, len(AXES), figsize=(4.6 * len(AXES) + 2, 4.5), sharey=True)
    colours = pyplot.colormaps["tab20"].colors
    for plot, (key, title) in zip(plots, AXES.items(), strict=True):
        scale = 1e-9 if key == "peak_memory" else 1
        for number, (name, results) in enumerate(sorted(found.items())):
            look = {"color": colours[number % 20], "marker": MARKERS[number % len(MARKERS)], "alpha": 0.85}
            plot.plot(results[key] * scale, 100 * quality(results), linestyle="", markersize=9, label=name, **look)
        plot.set_xlabel(title)
        plot.grid(alpha=0.3)
        if key == "trainable":
            plot.set_xscale("log")
    plots[0].set_ylabel("right answers on the test rows, %")
    plots[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"), help="default runs/finetune")
    words = sys.argv[1:]
    mine, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = parser.parse_args(mine)
    results = {method: run(method, options.output, more) for method in options.methods}
    found = {method: one for method, one in results.items() if one is not None}
    if not found:
        sys.exit("no method has a result")
    print(table(found))
    try:
        draw(found, options.output / "compare.png")
        print(f"the picture is {options.output / 'compare.png'}", file=sys.stderr)
    except ImportError:
        print('no picture: matplotlib is missing, pip install "mlxlm-kit[plot]"', file=sys.stderr)


if __name__ == "__main__":
    main()
