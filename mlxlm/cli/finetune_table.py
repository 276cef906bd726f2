"""What a fine-tuning run came to, for people: one table of numbers, one of answers before and after."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mlxlm.cli.options import shipped_model
from mlxlm.training.reporters import duration

if TYPE_CHECKING:
    from mlxlm.training.finetune import Outcome

_SHARES = ("accuracy", "balanced_accuracy", "macro_f1", "entity_f1", "exact_match")


def show(outcome: Outcome, file: Any = None) -> None:
    """Print the tables on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else 120, highlight=False)
    numbers = Table(box=SIMPLE_HEAD, title=f"{outcome.settings.method}: {outcome.settings.adapter_path}")
    splits = {"before (valid)": outcome.before, "valid": outcome.valid, "test": outcome.test}
    splits = {name: values for name, values in splits.items() if values}
    for name in ("", *splits):
        numbers.add_column(name, justify="left" if not name else "right")
    measures = dict.fromkeys(name for values in splits.values() for name in values if name != "answered")
    for measure in measures:
        cells = [_number(measure, values.get(measure)) for values in splits.values()]
        numbers.add_row(measure.replace("_", " "), *cells)
    if splits:
        console.print(numbers)
    if outcome.rows:
        answers = Table(box=SIMPLE_HEAD, title="answers")
        words = outcome.kind in ("words", "seq2seq")
        columns = ("asked", "wanted", "before", "after") if words else ("text", "right", "before", "after")
        for column in columns:
            answers.add_column(column, overflow="fold", ratio=3 if column in ("asked", "text") else 2)
        for row in outcome.rows:
            answers.add_row(*(_short(text) for text in (row.asked, row.wanted, row.before, row.after)))
        console.print(answers)
    for line in _facts(outcome):
        print(line, file=file)


def _facts(outcome: Outcome) -> list[str]:
    settings, result, counts = outcome.settings, outcome.result, outcome.counts
    best = "" if result.best_step is None else f", best at {result.best_step}"
    early = " (stopped early: no better loss)" if result.reason == "early" else ""
    lines = [
        f"trained   {counts.trainable:,} of {counts.total:,} parameters ({counts.share:.2%}), {result.step} steps{best}"
        f"{early}, {duration(outcome.seconds)}, peak memory {outcome.memory / 1e9:.2f} GB",
        f"saved in  {settings.adapter_path}",
    ]
    base = "" if settings.model == shipped_model() else f"--model {settings.model} "
    whole = settings.method == "full"
    where = f"--model {settings.adapter_path}" if whole else f"{base}--adapter-path {settings.adapter_path}"
    asked = repr(_short(outcome.rows[0].asked)) if outcome.rows else "..."
    verb = f"generate {where} --prompt" if outcome.kind in ("words", "seq2seq") else f"classify {where}"
    return [*lines, f"use it    mlxlm {verb} {asked}"]


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name in _SHARES else f"{value:.4g}"


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
