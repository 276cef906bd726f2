"""`mlxlm plan`: what a training run will take of the memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

_METHODS = ("full", "lora")


def plan(
    model: Annotated[str, typer.Option("--model", help="Checkpoint directory, or a config.json alone.")],
    method: Annotated[str, typer.Option(help="What is trained: full, or lora.")] = "full",
    rank: Annotated[int, typer.Option(help="Rank of low-rank adapters.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Rows of one pass.")] = 4,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    optimizer: Annotated[str, typer.Option(help="adamw, adafactor, lion, muon or sgd.")] = "adamw",
    recompute_layers: Annotated[int, typer.Option(help="Layers that are computed again, -1 for all.")] = 0,
    limit_gb: Annotated[float | None, typer.Option(help="Memory to fit, by default this machine's.")] = None,
) -> None:
    """Predict the memory of a training step by part, and the largest batch and length that fit."""
    from mlxlm.errors import UsageError, nearest
    from mlxlm.training import plan as plans

    if method not in _METHODS:
        raise UsageError(f"unknown method {method!r}{nearest(method, _METHODS)}")
    if rank < 1 or (limit_gb is not None and limit_gb <= 0):
        raise UsageError("--rank is at least 1 and --limit-gb more than 0")
    config = _config(model)
    settings = plans.PlanSettings(
        batch_size=batch_size, length=max_seq_length, dtype=dtype, optimizer=optimizer,
        recompute_layers=recompute_layers,
        trained=None if method == "full" else plans.low_rank_parameters(config, rank),
    )  # fmt: skip
    limit = plans.working_set() if limit_gb is None else int(limit_gb * 1e9)
    made = plans.predict(config, settings)
    for name, size in made.parts().items():
        print(f"{name.replace('_', ' '):16}{plans.readable(size):>12}")
    print(f"{'peak':16}{plans.readable(made.peak):>12}  of {plans.readable(limit)}")
    again = replace(settings, recompute_layers=-1)
    for label, choice in (("as asked", settings), ("all recomputed", again)):
        rows = plans.largest(config, choice, "batch_size", limit)
        length = plans.largest(config, choice, "length", limit)
        print(f"largest, {label}: {rows} rows of {max_seq_length} tokens, or {batch_size} rows of {length}")
    plans.check(config, settings, limit)


def _config(model: str):
    """The configuration of a checkpoint directory, hub id or config.json; no weights are read."""
    from mlxlm.checkpoint import read_json, resolve_model
    from mlxlm.models.families import family_of

    path = Path(model)
    if path.suffix != ".json":
        path = Path(resolve_model(model)) / "config.json"
    values = read_json(path)
    return family_of(values).read_config(values)
