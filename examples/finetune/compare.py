"""All methods on one task: quality against trainable parameters, time and memory.

    python examples/finetune/make_data.py --output runs/snippets
    python examples/finetune/compare.py
    python examples/finetune/compare.py --methods lora ia3 -- --iters 20

The second runs every method that has no result yet, and goes on with one that was interrupted. What follows -- goes to
mlxlm finetune. Each method runs by its own file, in a process of its own, so that its peak memory is its own. Prints a
table and writes runs/finetune/compare.png (needs matplotlib: pip install matplotlib).
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
        begun = ["--resume"] if any(target.glob("checkpoints/step-*")) else []
        done = subprocess.run([*command, "--adapter-path", str(target), *begun, *more], stdout=subprocess.DEVNULL)
        if done.returncode:
            print(f"{method} failed with status {done.returncode}", file=sys.stderr)
            return None
    return json.loads((target / "results.json").read_text(encoding="utf-8"))


def measures(results: dict[str, Any]) -> dict[str, float]:
    """What was measured on the test rows, or where there are none on the validation rows."""
    return results["test"] or results["valid"]


def quality(results: dict[str, Any]) -> float:
    """Accuracy; of runs without labels the share of right answers."""
    found = measures(results)
    return found["accuracy"] if "accuracy" in found else found["exact_match"]


# %% The table
def table(found: dict[str, dict[str, Any]]) -> str:
    """One line a method, best first, ties by loss: a table of Markdown."""
    lines = [
        "| method | right answers | loss | trainable | share | steps | time, s | peak memory, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, results in sorted(found.items(), key=lambda item: (-quality(item[1]), measures(item[1])["loss"])):
        share = results["trainable"] / results["parameters"]
        cells = (
            name, f"{quality(results):.1%}", f"{measures(results)['loss']:.4f}", f"{results['trainable']:,}",
            f"{share:.2%}", results["steps"], f"{results['seconds']:.0f}", f"{results['peak_memory'] / 1e9:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


# %% The picture
def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Right answers, and below them the loss, which still differs where all answers are right, against each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {
        "right answers on the test rows, %": lambda one: 100 * quality(one),
        "loss on the test rows": lambda one: measures(one)["loss"],
    }
    shape = len(rows), len(AXES)
    figure, plots = pyplot.subplots(*shape, figsize=(4.2 * shape[1] + 2, 3.6 * shape[0]), sharex="col", sharey="row")
    colours = pyplot.colormaps["tab20"].colors
    for line, (wanted, value) in zip(plots, rows.items(), strict=True):
        for plot, (key, title) in zip(line, AXES.items(), strict=True):
            scale = 1e-9 if key == "peak_memory" else 1
            for number, (name, results) in enumerate(sorted(found.items())):
                look = {"color": colours[number % 20], "marker": MARKERS[number % len(MARKERS)], "alpha": 0.85}
                plot.plot(results[key] * scale, value(results), linestyle="", markersize=9, label=name, **look)
            plot.grid(alpha=0.3)
            if key != "peak_memory":
                plot.set_xscale("log")
            if wanted.startswith("loss"):
                plot.set_yscale("log")
                plot.set_xlabel(title)
        line[0].set_ylabel(wanted)
    figure.legend(*plots[0, 0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"), help="default runs/finetune")
    parser.add_argument(
        "--model", nargs="+", default=[], metavar="METHOD=PATH", help="another model for a method, as bitfit=FOLDER"
    )
    words = sys.argv[1:]
    mine, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = parser.parse_args(mine)
    models = dict(text.split("=", 1) for text in options.model if "=" in text)
    if len(models) < len(options.model) or models.keys() - set(METHODS):
        parser.error(f"--model is METHOD=PATH, of {', '.join(METHODS)}; got {' '.join(options.model)}")
    given = {method: ["--model", models[method]] if method in models else [] for method in options.methods}
    results = {method: run(method, options.output, [*given[method], *more]) for method in options.methods}
    found = {method: one for method, one in results.items() if one is not None}
    if not found:
        sys.exit("no method has a result")
    print(table(found))
    try:
        draw(found, options.output / "compare.png")
        print(f"the picture is {options.output / 'compare.png'}", file=sys.stderr)
    except ImportError:
        print("no picture: matplotlib is missing, pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
