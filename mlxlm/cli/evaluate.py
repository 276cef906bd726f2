"""`mlxlm evaluate`: how good a model is, on rows of data or on tasks of lm_eval."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlm.cli import options as opt
from mlxlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from mlxlm.data import Rows
    from mlxlm.distributed import Joined

_ANSWER_OF_TASKS = 256  # tokens, unless told otherwise


def evaluate(
    model: opt.ModelOrShipped = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="A .jsonl, .txt, .csv ... file, a folder, or hub:OWNER/NAME."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", metavar="NAME=COLUMN", help="Rename columns, as label=category; may be repeated."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a folder: test (default), valid or train.")] = None,
    adapter_path: opt.AdapterPath = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at once; results don't depend on it.")] = 8,
    window: Annotated[
        int | None,
        typer.Option("--max-seq-length", help="Tokens read at once; default the model's context, at most 2048."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Of text: tokens from window to window; default half a window.")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut rows longer than the model's context.")] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-m",
            help="Most tokens of an answer; default 16 more than the longest right one, of tasks 256.",
        ),
    ] = None,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate/--no-generate", help="Also generate answers and count exact matches, which takes the most time."
        ),
    ] = True,
    normalize: Annotated[
        str, typer.Option("--normalize", help="Likelihood of choices by length: none, tokens or bytes.")
    ] = "bytes",
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows, or questions of a task.")] = None,
    predictions: Annotated[
        str | None, typer.Option("--predictions", metavar="FILE", help='JSONL of the rows with "predicted".')
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Tasks of lm_eval, separated by commas, instead of --data.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", help="Of tasks: examples before each.")] = None,
    include_path: Annotated[str | None, typer.Option("--include-path", help="Of tasks: a folder with more.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Of tasks: give questions as chats.")
    ] = False,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
    mesh: opt.MeshFlag = None,
) -> None:
    """Measure a model: JSON on stdout, a table on stderr. What is measured follows from the rows:

    {"text"}: perplexity and bits per byte.  {"text", "label"}, {"tokens", "labels"}: accuracy and F1.
    {"prompt", "completion"}, {"messages"}, {"source", "target"}: perplexity of the answers, exact matches.
    {"prompt", "choices", "answer"}, {"prompt", "chosen", "rejected"}: how often the right one is the likeliest.
    """
    if (data is None) == (tasks is None):
        raise UsageError("give either --data or --tasks, one of both")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, but must be at least 1")
    model = model or opt.shipped_model()
    loading: dict[str, Any] = {"dtype": dtype, "revision": revision, "adapters": adapter_path}
    if tasks is not None:
        foreign = {"--columns": columns or None, "--split": split, "--stride": stride, "--predictions": predictions}
        for flag in (flag for flag, value in foreign.items() if value is not None):
            raise UsageError(f"{flag} is for --data, not for --tasks")
        of_tasks = {"num_fewshot": num_fewshot, "limit": limit, "include_path": include_path}
        most = _ANSWER_OF_TASKS if max_tokens is None else max_tokens
        sizes = {"batch_size": batch_size, "max_length": window, "max_tokens": most}
        with opt.joined(mesh, axes=("tp", "pp")) as group:
            _evaluate_tasks(tasks, model, loading, sizes, {**of_tasks, "chat": apply_chat_template}, group)
        return
    from mlxlm.generation import EvaluationSettings

    settings = EvaluationSettings(
        batch_size=batch_size, truncate=truncate, window=window, stride=stride, max_tokens=max_tokens,
        generate=generate, normalize=normalize,  # type: ignore[arg-type]
    )  # fmt: skip
    rows = _rows(str(data), split, limit, opt.columns_of(columns or ()))
    target = opt.Output(predictions) if predictions is not None else None  # refuses before anything is computed
    if target is not None and rows.format == "text":
        raise UsageError("--predictions is for rows that have an answer, not for text")
    with opt.joined(mesh, axes=("tp", "pp")) as group:
        _evaluate_rows(rows, model, loading, settings, target, group)


def _evaluate_tasks(
    tasks: str, model: str, loading: dict[str, Any], sizes: dict[str, Any], wanted: dict[str, Any], group: Joined
) -> None:
    """Measure tasks of lm_eval, in all processes of a group together, and print what the first found."""
    from mlxlm.generation import Requests, check_harness, run_harness

    check_harness()  # before the model is read
    start = time.perf_counter()
    network, tokenizer = opt.load(model, **loading, group=group)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = run_harness(Requests(network, tokenizer, **sizes), names, **wanted)
    if group.first:
        _print({"model": model, "tasks": found}, start)


def _evaluate_rows(
    rows: Rows, model: str, loading: dict[str, Any], settings: Any, target: opt.Output | None, group: Joined
) -> None:
    """Measure rows, in all processes of a group together, and print what the first found."""
    from mlxlm.generation import as_predictions, evaluate_rows

    start = time.perf_counter()
    network, tokenizer = opt.load(model, **loading, group=group)
    progress = _Progress() if group.first else (lambda what, done, count: None)
    scores = evaluate_rows(network, tokenizer, rows, settings, progress=progress)
    if not group.first:
        return
    if target is not None:
        with target as file:
            for row in as_predictions(rows, scores.predicted):
                print(json.dumps(row, ensure_ascii=False), file=file)
    for note in scores.notes:
        print(f"note: {note}", file=sys.stderr)
    _print({"model": model, "data": rows.name, "format": scores.format, "rows": scores.count, **scores.values}, start)


def _rows(data: str, split: str | None, limit: int | None, columns: dict[str, str]) -> Rows:
    """The rows of a file, or of one split of a folder or a data set; a .txt or .md file is one text."""
    from mlxlm.data import Source, check_rows, read_documents, read_split
    from mlxlm.data.supervised_rows import TEXT_FILES

    path = Path(data).expanduser()
    if path.suffix.lower() in TEXT_FILES and path.is_file():
        if columns:
            raise UsageError("--columns is for rows; --data is a text")
        texts = list(read_documents(Source(location=data), [path]))
        if not texts:
            raise DataError(f"{data} is empty; there is no text to evaluate on")
        return check_rows(data, ((data, {"text": text}) for text in texts), limit)
    if path.is_file() and split is not None:
        raise UsageError("--split is for a folder; --data is a file")
    return read_split(data, split, limit=limit, columns=columns)


class _Progress:
    """Tells on stderr what is being done, then every few seconds how much of it is done and how long the rest takes."""

    apart = 5.0  # seconds

    def __init__(self) -> None:
        self.start = self.told = 0.0

    def __call__(self, what: str, done: int, count: int) -> None:
        """See `evaluate_rows`."""
        from mlxlm.training.reporters import duration

        now = time.perf_counter()
        if not done:
            self.start = self.told = now
            print(f"{count} {what}", file=sys.stderr)
        elif now - self.told >= self.apart:
            self.told = now
            left = (now - self.start) / done * (count - done)
            print(f"{done} of {count} done, {duration(left)} left", file=sys.stderr)


def _print(result: dict[str, Any], start: float) -> None:
    """The result as JSON on stdout, and as a table on stderr."""
    from mlxlm.runtime import memory

    rows = {name: value for name, value in result.items() if name != "tasks"}
    for task, values in result.get("tasks", {}).items():
        rows |= {f"{task} {name}": value for name, value in values.items() if name != "alias"}
    width = max(map(len, rows))
    for name, value in rows.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):{width}}  {shown}", file=sys.stderr)
    print(f"{time.perf_counter() - start:.1f} s, peak memory {memory().peak / 1e9:.2f} GB", file=sys.stderr)
    print(json.dumps(result, ensure_ascii=False, default=str))
