"""`mlxlm convert`: any checkpoint in, another format out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlm.cli import options as opt
from mlxlm.errors import UsageError, nearest

if TYPE_CHECKING:
    from mlxlm.conversion import GgufTarget, HubTarget, MlxTarget, Recipe, Report
    from mlxlm.conversion.conversion import Progress, Target

_FORMATS = ("hf", "mlx", "gguf")


def convert(
    model: opt.Model,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="PATH", help="A new folder, or file.gguf for --to gguf.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", help="hf: floats; mlx: quantized; gguf: one file; default as the other options ask for."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of floats: float32, float16, bfloat16; default as they are.")
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="2, 3, 4, 5, 6 or 8 bits a weight; default 4.")] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", help="Weights that share a scale.")] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="affine, mxfp4, mxfp8 or nvfp4.")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="PATTERN=BITS", help="As '*.down_proj=6', '*.up_proj=4:32' or '...=none'."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="FILE", help="JSON with default, layers, embeddings, head.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="To mlx: keep a quantized source's weights as they are.")
    ] = False,
    embeddings: Annotated[bool, typer.Option(help="Quantize the table of tokens.")] = True,
    head: Annotated[bool, typer.Option(help="Quantize the head.")] = True,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Bits where they matter: a recipe by sensitivity, of this mean over all weights."),
    ] = None,
    method: Annotated[str, typer.Option(help="round, gptq, awq or awq+gptq.")] = "round",
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="To calibrate on and judge by; default the Python language reference."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of tokens for calibration, and again for judging.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Measure it before and after.")] = False,
    gguf_type: Annotated[
        str | None, typer.Option("--type", help="Of matrices in GGUF: F16 (the default), Q8_0, Q4_0, ...")
    ] = None,
    gguf_embeddings: Annotated[
        str | None, typer.Option("--embeddings-type", help="Of the table and the head in GGUF; default as the others.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare with the source layer by layer.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what becomes of every tensor, write nothing.")
    ] = False,
    max_shard_size: Annotated[float | None, typer.Option(help="Of one safetensors file, in GB; default 5.")] = None,
    upload_to: Annotated[
        str | None, typer.Option("--upload", metavar="OWNER/NAME", help="Put the result on the hub; asks before.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository on the hub private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking.")] = False,
    revision: opt.Revision = None,
) -> None:
    """Convert a model: safetensors, PyTorch, GGUF, MLX, GPTQ, AWQ or 8-bit floats to floats, MLX-quantized or GGUF.

    Tensors stream through; an interrupted conversion goes on when the same command is given again, and the result
    appears when it is whole.
    """
    from mlxlm import conversion

    quantizing = any(value is not None for value in (bits, group_size, mode, layer, recipe, target_bits))
    quantizing = quantizing or keep or method != "round"
    if to is None:
        to = "mlx" if quantizing else "gguf" if (output or "").endswith(".gguf") else "hf"
    if to not in _FORMATS:
        raise UsageError(f"--to {to!r} is no format{nearest(to, _FORMATS)}")
    if to != "mlx" and quantizing:
        raise UsageError(
            "--bits, --group-size, --mode, --layer, --recipe, --keep, --target-bits and --method go with --to mlx"
        )
    foreign = {"--type": gguf_type, "--embeddings-type": gguf_embeddings}
    if to == "gguf":
        foreign = {"--dtype": dtype, "--max-shard-size": max_shard_size}
    given = [name for name, value in foreign.items() if value is not None]
    if given:
        goes = (
            "goes with no GGUF file" if to == "gguf" else "goes with GGUF: --to gguf, or an --output that ends in .gguf"
        )
        raise UsageError(f"{' and '.join(given)} {goes}")
    size = 5.0 if max_shard_size is None else max_shard_size
    if not 0.0 < size < float("inf"):
        raise UsageError(f"--max-shard-size is {size:g}; expected GB, a number above 0")
    shard = max(int(size * 1e9), 1)
    target: HubTarget | MlxTarget | GgufTarget
    if to == "gguf":
        target = conversion.GgufTarget(kind=gguf_type or "F16", embeddings=gguf_embeddings)  # type: ignore[arg-type]
    elif to == "hf":
        target = conversion.HubTarget(dtype=dtype, max_shard_bytes=shard)
    else:
        chosen = None if keep else _recipe(bits, group_size, mode, layer or [], recipe, embeddings, head)
        target = conversion.MlxTarget(recipe=chosen, dtype=dtype, max_shard_bytes=shard)
    if dry_run:
        _print_plan(model, revision, target, output)
        return
    if upload_to is not None:
        conversion.check_repository(upload_to)
    if output is None:
        raise UsageError("--output PATH is needed: where the result goes")
    request = conversion.Request(
        model=model,
        output=Path(output),
        target=target,
        revision=revision,
        target_bits=target_bits,
        method=method,  # type: ignore[arg-type]
        text=None if text is None else Path(text),
        rows=rows,
        length=length,
        measure=perplexity,
        verify=verify,
    )
    with _progress() as (say, progress):
        report = conversion.fulfil(request, say=say, progress=progress)
    _print_report(report)
    if upload_to is not None:
        address = conversion.upload(
            output, upload_to, confirm=lambda q: yes or typer.confirm(q, err=True), private=private
        )
        print("not uploaded" if address is None else f"uploaded to {address}", file=sys.stderr)


def _recipe(
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    layers: list[str],
    file: str | None,
    embeddings: bool,
    head: bool,
) -> Recipe:
    from mlxlm.conversion import Recipe, parse_layer, quantization, read_recipe

    if file is not None:
        if (bits, group_size, mode, layers) != (None, None, None, []):
            raise UsageError("--recipe says it all: it doesn't go with --bits, --group-size, --mode or --layer")
        return read_recipe(file)
    parsed = tuple(parse_layer(text) for text in layers)
    return Recipe(default=quantization(bits, group_size, mode), layers=parsed, embeddings=embeddings, head=head)


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
