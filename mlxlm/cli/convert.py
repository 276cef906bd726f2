"""`mlxlm convert`: any checkpoint in, another format out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlm.cli import options as opt
from mlxlm.cli.convert_flags import CONVERT_FLAGS
from mlxlm.cli.flags import flag_of, given_of, with_flags
from mlxlm.errors import UsageError, nearest

if TYPE_CHECKING:
    from mlxlm.conversion import Recipe, Report
    from mlxlm.conversion.conversion import Progress, Target

_FORMATS = ("hf", "mlx", "gguf")
# Settings that ask for a quantized result, settings of a recipe, and those that other formats have no use for.
_QUANTIZING = ("bits", "group_size", "mode", "layer", "recipe", "keep", "target_bits", "method")
_OF_A_RECIPE = ("bits", "group_size", "mode", "layer")
_OF_GGUF, _OF_FOLDERS = ("type", "embeddings_type"), ("dtype", "max_shard_size")


@with_flags(CONVERT_FLAGS)
def convert(
    model: opt.Model,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="PATH", help="A new folder, or file.gguf for --to gguf.")
    ] = None,
    revision: opt.Revision = None,
    **flags: Any,
) -> None:
    """Convert a model: safetensors, PyTorch, GGUF, MLX, GPTQ, AWQ or 8-bit floats to floats, MLX-quantized or GGUF.

    Tensors stream through; an interrupted conversion goes on when the same command is given again, and the result
    appears when it is whole.
    """
    from mlxlm import conversion

    given = given_of(flags)
    target = _target(given, output)
    if given.get("dry_run"):
        _print_plan(model, revision, target, output)
        return
    repository = given.get("upload")
    if repository is not None:
        conversion.check_repository(repository)
    if output is None:
        raise UsageError("--output PATH is needed: where the result goes")
    settings = {name: given[name] for name in ("target_bits", "method", "rows", "length", "verify") if name in given}
    request = conversion.Request(
        model=model,
        output=Path(output),
        target=target,
        revision=revision,
        text=Path(given["text"]) if "text" in given else None,
        measure=given.get("perplexity", False),
        **settings,
    )
    with _progress() as (say, progress):
        report = conversion.fulfil(request, say=say, progress=progress)
    _print_report(report)
    if repository is not None:
        yes, private = given.get("yes", False), given.get("private", False)
        address = conversion.upload(
            output, repository, confirm=lambda q: yes or typer.confirm(q, err=True), private=private
        )
        print("not uploaded" if address is None else f"uploaded to {address}", file=sys.stderr)


def _target(given: Mapping[str, Any], output: str | None) -> Target:
    """The format that is asked for, or meant. Raises UsageError for flags of another one."""
    from mlxlm import conversion

    quantizing = [name for name in _QUANTIZING if name in given and given[name] != "round"]
    to = given.get("to") or ("mlx" if quantizing else "gguf" if (output or "").endswith(".gguf") else "hf")
    if to not in _FORMATS:
        raise UsageError(f"--to {to!r} is no format{nearest(to, _FORMATS)}")
    if to != "mlx" and quantizing:
        raise UsageError(f"{_listed(quantizing)} asks for a quantized result, which is --to mlx, not --to {to}")
    foreign = [name for name in (_OF_FOLDERS if to == "gguf" else _OF_GGUF) if name in given]
    if foreign:
        gguf = "goes with GGUF: --to gguf, or an --output that ends in .gguf"
        raise UsageError(f"{_listed(foreign)} {'goes with no GGUF file' if to == 'gguf' else gguf}")
    if to == "gguf":
        return conversion.GgufTarget(kind=given.get("type", "F16"), embeddings=given.get("embeddings_type"))
    folder: dict[str, Any] = {"dtype": given.get("dtype"), "max_shard_bytes": _shard_bytes(given)}
    if to == "hf":
        return conversion.HubTarget(**folder)
    return conversion.MlxTarget(recipe=None if given.get("keep") else _recipe(given), **folder)


def _listed(settings: list[str]) -> str:
    return " and ".join(map(flag_of, settings))


def _shard_bytes(given: Mapping[str, Any]) -> int:
    size = given.get("max_shard_size", 5.0)
    if not 0.0 < size < float("inf"):
        raise UsageError(f"--max-shard-size is {size:g}; expected GB, a number above 0")
    return max(int(size * 1e9), 1)


def _recipe(given: Mapping[str, Any]) -> Recipe:
    from mlxlm.conversion import Recipe, parse_layer, quantization, read_recipe

    if "recipe" in given:
        if any(name in given for name in _OF_A_RECIPE):
            raise UsageError("--recipe says it all: it doesn't go with --bits, --group-size, --mode or --layer")
        return read_recipe(given["recipe"])
    form = quantization(*(given.get(name) for name in ("bits", "group_size", "mode")))
    layers = tuple(parse_layer(text) for text in given.get("layer", ()))
    return Recipe(default=form, layers=layers, embeddings=given.get("embeddings", True), head=given.get("head", True))


def _print_plan(model: str, revision: str | None, target: Target, output: str | None) -> None:
    """One line a tensor: its name in the target, shape, type and bytes, and what it comes from."""
    from mlxlm.conversion import dry_run
    from mlxlm.models import find

    total = 0
    for move in dry_run(find(model, revision=revision), target, output or "model.gguf"):
        total += move.nbytes
        source = ", ".join(move.sources) or "the configuration"
        shape = "x".join(map(str, move.shape)) or "scalar"
        what = "(left out)" if move.name is None else f"{move.name}  {shape}  {move.dtype}  {move.nbytes}"
        print(f"{what}  <- {source}")
    print(f"{total / 1e6:,.1f} MB in all", file=sys.stderr)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Progress]]:
    """What tells a person how far it is, on stderr: a bar on a terminal, else a line every ten percent."""
    if not sys.stderr.isatty():
        shown = -1

        def progress(done: int, total: int, name: str) -> None:
            nonlocal shown
            percent = 10 * (10 * done // max(total, 1))
            if percent > shown:
                shown = percent
                print(f"{percent}% of {total / 1e6:,.1f} MB", file=sys.stderr)

        yield lambda text: print(text, file=sys.stderr), progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("preparing", total=None)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name or "done")

        yield lambda text: bar.update(task, description=text), advance


def _print_report(report: Report) -> None:
    done = report.conversion
    print(
        f"{done.source_bytes / 1e6:,.1f} MB -> {done.nbytes / 1e6:,.1f} MB, {done.bits_per_weight:.2f} bits a weight",
        file=sys.stderr,
    )
    if done.errors:
        worst = ", ".join(f"{module} {error:.3f}" for module, error in done.worst(3))
        print(f"largest relative errors of weights: {worst}", file=sys.stderr)
    if report.before is not None:
        print(f"perplexity {report.before:.3f} before, {report.after:.3f} after", file=sys.stderr)
    if report.verification is not None:
        found = report.verification
        print(f"compared with {found.reference}: relative difference up to {found.worst:.2e}", file=sys.stderr)
        if found.agreement is not None:
            print(f"likeliest word the same at {found.agreement:.1%} of positions", file=sys.stderr)
    print(done.output)
