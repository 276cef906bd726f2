"""`mlxlm doctor`: what this machine has, and whether mlxlm computes rightly on it."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mlxlm.kernels.attention.selfcheck import Check
    from mlxlm.layers import AttentionSpec
    from mlxlm.models.config import StackSpec

_CPU_LENGTHS, _LENGTHS = (256, 1024), (512, 2048, 8192)  # at which attention is timed


def doctor(
    tune: Annotated[
        bool, typer.Option("--tune", help="Time attention and decoding steps on a model and keep the fastest.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH_OR_ID", help="The model that --tune times.")
    ] = None,
    skip_check: Annotated[bool, typer.Option("--skip-check", help="Report the machine only.")] = False,
) -> None:
    """Report machine, MLX, BLAS and memory, and check attention, norms and fused steps against their formulas.

    Metal kernels that fail are switched off on this machine, and a report to paste into an issue is printed.
    """
    if tune != (model is not None):
        raise UsageError("--tune and --model go together: the shapes that are timed are those of a model")
    path = None
    if model is not None:
        from mlxlm.models import find

        path = find(model)
        _shapes(path)  # a wrong name is told before a minute of checks
    machine()
    failed = [] if skip_check else [*check_attention(), *check_one_token(), *check_norms()]
    if path is not None:
        _tune(path)
    if failed:
        raise typer.Exit(1)


def machine() -> None:
    """Print what the machine has."""
    import mlx.core as mx

    from mlxlm import runtime
    from mlxlm.version import __version__

    blas, memory, info = runtime.load_blas(), runtime.memory(), mx.device_info()
    rows = {
        "mlxlm": __version__,
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {info.get('device_name', 'unknown device')}",
        "MLX": f"{mx.__version__}, backend {runtime.backend()}, architecture {info.get('architecture', 'unknown')}",
        "BLAS": f"{blas.status}{f' ({blas.name})' if blas.name else ''}",
        "memory": "unknown" if memory.total is None else f"{memory.total / 1e9:.1f} GB",
        "working set": "unknown" if memory.working_set is None else f"{memory.working_set / 1e9:.1f} GB",
    }
    for name, value in rows.items():
        print(f"{name:12} {value}")
    if blas.advice():
        print(f"advice       {blas.advice()}")


def check_attention() -> list[Check]:
    """Check attention, print a line an implementation and every failure; returns the failures."""
    from mlxlm import runtime
    from mlxlm.kernels.attention import selfcheck

    checks = _watched("attention", selfcheck.run())
    failed = _told("attention", checks, "as the reference")
    if runtime.backend() == "metal" and selfcheck.record_failures(checks):
        print("Our Metal kernels are switched off on this machine. Please paste all of this into an issue.")
    return failed


def check_norms() -> list[Check]:
    """Check MLX's fused norms, which the layers use; prints and returns as `check_attention` does."""
    from mlxlm.layers import norm_check

    failed = _told("norms", _watched("norms", norm_check.run()), "as the formula")
    if failed:
        print("MLX's own norms are wrong on this machine: don't train on it. Please paste all of this into an issue.")
    return failed


def check_one_token() -> list[Check]:
    """Check the kernels of fused decoding steps where there are any; prints and returns as `check_attention` does."""
    from mlxlm.kernels.one_token import selfcheck

    checks = _watched("fused steps", selfcheck.run())
    failed = _told("one token", checks, "as plain operations", of="")
    if checks and selfcheck.record_failures(checks):
        print("Fused decoding steps are switched off on this machine. Please paste all of this into an issue.")
    return failed


def _watched(what: str, checks: Iterator[Check]) -> list[Check]:
    """The checks, with a count on a terminal while they run."""
    done: list[Check] = []
    for number, one in enumerate(checks, 1):
        done.append(one)
        if sys.stderr.isatty():
            print(f"\rchecking {what}, {number} ...", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return done


def _told(what: str, checks: list[Check], right: str, of: str = ", outputs and gradients") -> list[Check]:
    """Print how many of each implementation are right, and each that is not; returns the latter."""
    for implementation in dict.fromkeys(one.implementation for one in checks):
        own = [one for one in checks if one.implementation == implementation]
        good = sum(not one.problem for one in own)
        print(f"{what:12} {implementation}: {good} of {len(own)} cases {right}{of}")
    failed = [one for one in checks if one.problem]
    for one in failed:
        print(f"FAILED       {one.implementation}, {one.case}: {one.problem}")
    return failed


def _shapes(path: Path) -> set[Any]:
    """The kernel shapes of a model's attention layers.  path: a checkpoint directory or .gguf file."""
    from mlxlm.checkpoint import read_json
    from mlxlm.models import family_of
    from mlxlm.models.loading import open_model

    if path.suffix.lower() == ".gguf":
        config = open_model(path).source.config
    else:
        config = family_of(values := read_json(path / "config.json")).read_config(values)
    return {
        _kernel_shape(layer.attention, _modifiers(stack, layer.attention))
        for stack in (config.encoder, config.decoder)
        if stack is not None
        for layer in stack.layers
    }


def _tune(path: Path) -> None:
    from mlxlm import runtime
    from mlxlm.kernels.attention import selfcheck

    shapes = _shapes(path)
    on_cpu = runtime.backend() == "cpu"
    if not on_cpu:  # there a compiled form costs seconds of a C++ compiler at its first step
        _tune_steps(path)
    for shape in sorted(shapes, key=str):
        for line in selfcheck.tune(
            **dict(shape),
            dtype="float32" if on_cpu else "bfloat16",
            lengths=_CPU_LENGTHS if on_cpu else _LENGTHS,
        ):
            print(f"tuned        {line}")


def _tune_steps(path: Path) -> None:
    """Time decoding steps where the model decodes, and print what is found."""
    from mlxlm.generation.step_tuning import tune_steps
    from mlxlm.models.loading import load_model

    loaded = load_model(path)
    if loaded.config.decoder is None or loaded.config.has_memory or not loaded.config.predicts_words:
        return
    for line in tune_steps(loaded):
        print(f"tuned        {line}")


def _kernel_shape(spec: AttentionSpec, modifiers: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """What the choice of a kernel depends on, as arguments of `selfcheck.tune`; layers that share it are timed once."""
    heads = {"heads": spec.num_heads, "kv_heads": spec.num_kv_heads}
    widths = {"head_dim": spec.head_dim, "value_dim": spec.head_dim}
    return tuple((heads | widths | {"causal": spec.causal, "window": spec.window, "modifiers": modifiers}).items())


def _modifiers(stack: StackSpec, spec: AttentionSpec) -> tuple[str, ...]:
    """What is added to the scores of a layer, as the self-check names it."""
    from mlxlm.layers import AlibiSpec, RelativeBucketsSpec

    has = {
        "alibi": isinstance(spec.positions, AlibiSpec),
        "relative_bias": isinstance(spec.positions, RelativeBucketsSpec) or stack.positions is not None,
        "softcap": spec.softcap is not None,
    }
    return tuple(name for name, present in has.items() if present)
