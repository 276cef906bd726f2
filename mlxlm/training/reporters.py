"""Who is told about a run: the terminal and a file of metrics."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from mlxlm import runtime
from mlxlm.checkpoint import write_bytes_atomic
from mlxlm.errors import TrainingError

# What every report has; anything else is of the source of batches.
_OF_STEPS = (
    "step", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_second", "memory", "skipped",
)  # fmt: skip
_SILENCE = 10.0  # seconds of an evaluation without a line
# What every evaluation has; anything else is a measure of the run's own.
_OF_EVALUATIONS = ("step", "valid_loss", "perplexity", "count")


class Reporter:
    """Base of all reporters; does nothing.

    Metrics have step, loss (mean since the last report), learning_rate, gradient_norm, tokens (in all),
    tokens_per_second, memory (peak, bytes) and skipped; evaluations have step, valid_loss, perplexity and count.

    everywhere: told in all processes of a run, because it calls the model; others are told in the first alone.
    """

    everywhere = False

    def on_start(self, trainer: Any) -> None:
        """The run starts, or goes on: trainer.progress.step says where."""

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        """Some steps are done. The model may be a step further: weights are read in `on_evaluation` or `on_end`."""

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        """The validation data has been gone through."""

    def on_evaluating(self, progress: dict[str, Any]) -> None:
        """A batch of the validation data is done: step, done, and batches, all of them, None where nothing says it."""

    def on_message(self, text: str) -> None:
        """Something a person should know."""

    def on_end(self, trainer: Any) -> None:
        """The run has ended, well or not."""


class MetricsFile(Reporter):
    """`RUN/metrics.jsonl`: one JSON object a report. A resumed run cuts off what came after its checkpoint, and what it
    would tell of that step once more is left out: the line that is there already is kept.

    Numbers that aren't finite are written as null.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "metrics.jsonl"
        self._there: set[tuple[int, bool]] = set()  # step and whether it is an evaluation

    def on_start(self, trainer: Any) -> None:
        """Keep the lines up to the step where the run goes on, whole ones alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = keep_until(self.path, trainer.progress.step)
        self._there = {(row["step"], "valid_loss" in row) for row in kept}

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a line."""
        self._append(metrics)

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        """Append a line."""
        self._append(metrics)

    def _append(self, metrics: dict[str, Any]) -> None:
        if (metrics["step"], "valid_loss" in metrics) in self._there:
            return
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in metrics.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk; the weights matter more than a line about them
            print(f"warning: can't write {self.path}: {error.strerror}", file=sys.stderr)


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut off what a file of rows, one JSON object a line, says of later steps, and torn lines; the rows that stay."""
    if not path.is_file():
        return []
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_bytes_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())
    return kept


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, or of the one in a run's folder; a torn last line is passed over.

    Raises TrainingError when there is no such file.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TrainingError(f"{path} can't be read: {error.strerror}; expected a run's folder") from None
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class Console(Reporter):
    """Progress on the terminal: one line that is rewritten there, plain lines where there is none.

    stream: default standard error.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self._live: Any = None
        self._task: Any = None
        self._steps = 0
        self._started, self._first = time.perf_counter(), 0
        self._text, self._told = "", 0.0

    def on_start(self, trainer: Any) -> None:
        """Set up the line; say how much is trained, and where a resumed run goes on."""
        self._steps, self._first = trainer.settings.steps, trainer.progress.step
        self._started = time.perf_counter()
        count = sum(array.size for array in trainer.step.parameters.values())
        self._say(f"training {count:,} parameters" + (f", from step {self._first}" if self._first else ""))
        if runtime.backend() == "cpu" and trainer.settings.dtype in ("bfloat16", "float16"):
            self._say(f"dtype {trainer.settings.dtype}: on the CPU products of 16 bits are about ten times slower")
        batches, there = trainer.validation_batches()
        if there is not None and batches is not None:
            of = f"{batches} of {there} batches" if batches < there else f"all {there} batches"
            self._say(f"an evaluation goes through {of} of the validation data (val_batches)")
        if self.stream.isatty():
            self._open()

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        """Show the numbers and the time left."""
        done = metrics["step"] - self._first
        left = (time.perf_counter() - self._started) / max(done, 1) * (self._steps - metrics["step"])
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  {metrics['memory'] / 1e9:.2f} GB"
        )
        own = {name: value for name, value in metrics.items() if name not in _OF_STEPS}
        text = "  ".join([text, *(f"{name.replace('_', ' ')} {value:.4g}" for name, value in own.items())])
        if self._live is not None:
            self._live.update(self._task, completed=metrics["step"], description=text)
        else:
            self._say(f"step {metrics['step']}/{self._steps}  {text}  {duration(left)} left")
        self._text, self._told = text, time.perf_counter()

    def on_evaluating(self, progress: dict[str, Any]) -> None:
        """How far the evaluation is: in the line, or where there is none in a new one every ten seconds."""
        of = "" if progress["batches"] is None else f"/{progress['batches']}"
        text = f"validation {progress['done']}{of}"
        if self._live is not None:
            self._live.update(self._task, description=f"{self._text}  {text}")
        elif time.perf_counter() - self._told >= _SILENCE:
            self._told = time.perf_counter()
            self._say(f"step {progress['step']}  {text}")

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        """A line of its own."""
        if self._live is not None:
            self._live.update(self._task, description=self._text)
        own = {name: value for name, value in metrics.items() if name not in _OF_EVALUATIONS}
        more = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in own.items())
        self._say(
            f"step {metrics['step']}  validation loss {metrics['valid_loss']:.4f}  "
            + (more or f"perplexity {metrics['perplexity']:.4g}")
        )

    def on_message(self, text: str) -> None:
        """A line of its own."""
        self._say(text)

    def on_end(self, trainer: Any) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._live = Progress(
            MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn(),
            console=RichConsole(file=self.stream),
        )  # fmt: skip
        self._task = self._live.add_task("", total=self._steps, completed=self._first)
        self._live.start()

    def _say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self.stream, flush=True)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = max(int(seconds), 0)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
