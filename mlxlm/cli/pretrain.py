"""`mlxlm pretrain`: train a model from scratch by a recipe."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlm.cli import options as opt

if TYPE_CHECKING:
    from mlxlm.training import Result


def pretrain(
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="The recipe; a resumed run has its own.")
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="FOLDER", help="The run's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder, exactly.")] = False,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of one pass.")] = None,
    grad_accumulation_steps: Annotated[int | None, typer.Option(help="Passes of one update.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At the peak of the schedule.")] = None,
    recompute_layers: Annotated[int | None, typer.Option(help="Layers that are computed again, -1 for all.")] = None,
    loss_chunk: Annotated[int | None, typer.Option(help="Words of the loss at once.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, corruption and dropout.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="check: refuse a run that can't fit (default); auto: choose settings that fit; off."),
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="tensorboard or wandb; may be repeated.")
    ] = None,
    mesh: opt.MeshFlag = None,
    zero: opt.Zero = 0,
    schedule: opt.Schedule = "1f1b",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any value, as training.learning_rate=1e-3; repeatable."),
    ] = None,
) -> None:
    """Train a model from scratch by a recipe (YAML); the model ends up in OUTPUT/model.

    Ctrl-C or SIGTERM saves a checkpoint and ends with status 130 or 143; --resume goes on from there.
    """
    from mlxlm.errors import UsageError
    from mlxlm.training import Console, MetricsFile, recipe
    from mlxlm.training.tracking import reporter
    from mlxlm.training.yaml_files import parse_override

    if config is None and not (resume and output):
        raise UsageError("--config RECIPE.yaml is needed; a run that goes on needs --resume and --output RUN")
    values = recipe.read(config or Path(output or "") / "recipe.yaml")
    flags = {
        "output": output,
        "training.steps": steps,
        "data.batch_size": batch_size,
        "training.accumulation": grad_accumulation_steps,
        "data.max_length": max_seq_length,
        "training.learning_rate": learning_rate,
        "training.recompute_layers": recompute_layers,
        "loss_chunk": loss_chunk,
        "training.seed": seed,
        "memory": memory,
        "report_to": report_to or None,
    }
    changes = [parse_override(text) for text in set_ or ()]
    changes += [(name, value) for name, value in flags.items() if value is not None]
    with opt.joined(mesh, zero, schedule) as group:
        checked = recipe.check(recipe.override(values, changes)).fitted(joined=group)
        outside = [reporter(name, checked.folder) for name in checked.values["report_to"]] if group.first else []
        reporters = [Console(), MetricsFile(checked.folder), *outside] if group.first else []
        trainer = checked.trainer(reporters, resume=resume, joined=group)
        with checked.held(joined=group):
            result = trainer.run(resume=resume)
    if group.first or result.reason in ("SIGINT", "SIGTERM"):
        _tell(result, checked.folder)


def _tell(result: Result, folder: Path) -> None:
    if result.reason in ("SIGINT", "SIGTERM"):
        print(
            f"{result.reason} after step {result.step}; the checkpoint is saved. "
            f"Go on: mlxlm pretrain --resume --output {folder}",
            file=sys.stderr,
        )
        raise typer.Exit(128 + signal.Signals[result.reason])
    print(f"{result.step} steps; the model is in {folder / 'model'}", file=sys.stderr)
