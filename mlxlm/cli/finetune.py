"""`mlxlm finetune`: teach a model by examples, with any method."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mlxlm.cli import options as opt
from mlxlm.cli.finetune_flags import FLAGS
from mlxlm.cli.flags import with_flags
from mlxlm.errors import UsageError

if TYPE_CHECKING:
    from mlxlm.distributed import Joined
    from mlxlm.training import Result
    from mlxlm.training.finetune import Outcome


@with_flags(FLAGS)
def finetune(
    model: opt.ModelOrShipped = None,
    adapter_path: opt.AdapterOutput = None,
    config: opt.ConfigFile = None,
    resume: opt.Resume = False,
    mesh: opt.MeshFlag = None,
    zero: opt.Zero = 0,
    pipeline_schedule: Annotated[str, typer.Option(help="Of pipeline stages: 1f1b or gpipe.")] = "1f1b",
    train: Annotated[bool, typer.Option("--train", help="No effect: training is what this does.", hidden=True)] = True,
    **flags: Any,
) -> None:
    """Fine-tune a model on rows of examples and show what it learned.

    Rows are {"prompt", "completion"}, {"messages"}, {"text"}, {"text", "label"}, {"tokens", "labels"} or
    {"source", "target"}. Labels give the model a classification head. The result works with `--adapter-path` of the
    other commands.
    Ctrl-C saves a checkpoint; --resume goes on from there.
    """
    given = {"model": model, "adapter_path": adapter_path, **flags}
    given = {name: value for name, value in given.items() if value is not None}
    with opt.joined(mesh, zero, pipeline_schedule) as group:
        outcome = _run(given, config, resume, group)
    if outcome.stopped:
        end_early("finetune", outcome.result, outcome.settings.adapter_path)
    from mlxlm.cli.finetune_table import show

    if group.first:
        show(outcome)


def end_early(verb: str, result: Result, folder: str) -> NoReturn:
    """Say how a run that a signal ended goes on, and exit with the signal's status."""
    print(
        f"{result.reason} after step {result.step}; the checkpoint is saved. Go on: "
        f"mlxlm {verb} --resume --adapter-path {folder}",
        file=sys.stderr,
    )
    raise typer.Exit(128 + signal.Signals[result.reason])


def _run(given: dict[str, Any], config: str | None, resume: bool, group: Joined) -> Outcome:
    """The run that flags and file ask for, done.  group: the processes that share it."""
    from mlxlm.training import Console, MetricsFile
    from mlxlm.training.finetune import FinetuneSettings
    from mlxlm.training.finetune import finetune as run
    from mlxlm.training.finetune.run import SETTINGS
    from mlxlm.training.tracking import reporter

    settings = FinetuneSettings.from_json(values_of(given, config, resume, SETTINGS))
    console = Console()
    outside = [reporter(name, settings.folder) for name in settings.report_to if group.first]
    reporters = [console, MetricsFile(settings.folder), *outside]
    say = console.on_message if group.first else (lambda text: None)
    return run(settings, reporters if group.first else [], resume=resume, say=say, joined=group)


def values_of(given: dict[str, Any], config: str | None, resume: bool, name: str) -> dict[str, Any]:
    """The settings of a run: flags over a file, which for a resumed run is the one called `name` in its folder."""
    from mlxlm.training.yaml_files import read_yaml

    values: dict[str, Any] = {}
    if config is None and resume:
        folder = Path(given.get("adapter_path", "adapters")).expanduser()
        if not (folder / name).is_file():
            raise UsageError(f"{folder} holds no run to resume: there is no {name}")
        values = read_yaml(folder / name, "expected the settings of a run")
    elif config is not None:
        values = read_yaml(config, "expected settings such as `learning_rate: 1e-4`")
    return _merged(values, given)


def _merged(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The values of a file with those of flags over them."""
    from mlxlm.training.yaml_files import parse_override

    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if "data" not in given and "data" not in values:
        raise UsageError("--data is needed: a folder with train.jsonl, a file, or a hub data set")
    of_method = dict(parse_override(text) for text in given.pop("set", ()))
    columns = opt.columns_of(given.pop("columns", ()))
    if "chat_template_config" in given:
        given["chat_template_config"] = opt.parse_object("--chat-template-config", given["chat_template_config"])
    if "iters" in given:
        values.pop("epochs", None)
    if "epochs" in given:
        values.pop("iters", None)
    if "mask_prompt" in given:
        values.pop("loss_on", None)
    values = {**values, **given}
    if of_method:
        values["set"] = {**(values.get("set") or {}), **of_method}
    if columns:
        values["columns"] = {**(values.get("columns") or {}), **columns}
    values.setdefault("model", opt.shipped_model())
    return values
