"""A run of alignment with its numbers before and after, and a picture of reward, divergence and length over time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mlxlm.alignment import AlignSettings, Outcome
from mlxlm.alignment import align as run
from mlxlm.training import Console, MetricsFile, read_metrics

CURVES = {"reward": "reward", "accuracy": "accuracy", "kl": "divergence, nats an answer", "length": "length, tokens"}


def align(folder: Path, values: dict[str, Any], title: str, resume: bool = False) -> Outcome:
    """Align, print what changed, draw. The run is in folder/aligned."""
    target = folder / "aligned"
    settings = AlignSettings.from_json({**values, "adapter_path": str(target)})
    outcome = run(
        settings, [Console(), MetricsFile(target)], resume=resume, say=lambda text: print(text, file=sys.stderr)
    )
    print(title)
    print(f"{'':20}{'before':>10}{'after':>10}")
    for name, after in outcome.after.items():
        print(f"{name.replace('_', ' '):20}{outcome.before[name]:>10.4f}{after:>10.4f}")
    for prompt, before, after in outcome.answers:
        print(f"{prompt!r}: {before!r} before, {after!r} after")
    print(f"{outcome.result.step} steps in {outcome.seconds:.0f} s")
    try:
        draw(target, folder / "curves.png", title)
    except ImportError:
        print("no picture: matplotlib is missing, pip install matplotlib", file=sys.stderr)
    return outcome


def draw(folder: Path, path: Path, title: str) -> None:
    """One plot a quantity: of held-out prompts with dots, and of the answers that were learned from without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(folder)
    found = {name: label for name, label in CURVES.items() if any(name in row for row in rows)}
    figure, plots = pyplot.subplots(1, len(found), figsize=(4.5 * len(found), 3.8), squeeze=False)
    for plot, (name, label) in zip(plots[0], found.items(), strict=True):
        for held_out, style in ((False, "-"), (True, "o-")):
            points = [(row["step"], row[name]) for row in rows if name in row and ("valid_loss" in row) == held_out]
            if points:
                plot.plot(*zip(*points, strict=True), style, label="held out" if held_out else "rollouts", markersize=3)
        plot.set_xlabel("step")
        plot.set_ylabel(label)
        plot.grid(alpha=0.3)
        plot.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
