"""`mlxlm plan`: what a training run will take of the memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.models.config import TransformerConfig


def plan(
    model: Annotated[str, typer.Option("--model", help="Checkpoint directory, .gguf file, hub id or config.json.")],
    method: Annotated[str, typer.Option(help="How it is trained: full, lora, dora, qlora, ia3 ...")] = "full",
    rank: Annotated[int | None, typer.Option(help="Rank of low-rank adapters, default the method's.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help='Where adapters go, as "query,value" or "all-linear"; default the method\'s.'),
    ] = None,
    quantized: Annotated[
        int | None, typer.Option(metavar="BITS", help="Bits of the frozen weights; default those of the checkpoint.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of one pass.")] = 4,
    grad_accumulation_steps: Annotated[int, typer.Option(help="Passes of one update.")] = 1,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 2048,
    target_length: Annotated[int | None, typer.Option(help="Of a decoder behind an encoder, default as many.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    master_weights: Annotated[bool, typer.Option(help="Keep what is trained in float32.")] = True,
    ema: Annotated[bool, typer.Option("--ema", help="Keep a moving average of the weights.")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw, adafactor, lion, muon or sgd.")] = "adamw",
    recompute_layers: Annotated[int, typer.Option(help="Layers that are computed again, -1 for all.")] = 0,
    loss_chunk: Annotated[int | None, typer.Option(help="Words of the loss at once.")] = None,
    limit_gb: Annotated[float | None, typer.Option(help="Memory to fit, by default this machine's.")] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="Of processes, as dp=2,tp=2: memory and traffic of each. Rows are of all together."),
    ] = None,
    zero: Annotated[int, typer.Option(help="What replicas share: 0 nothing to 3 everything.")] = 0,
    schedule: Annotated[str, typer.Option(help="Of a pipeline: 1f1b or gpipe.")] = "1f1b",
    machines: Annotated[int | None, typer.Option(help="Recommend a mesh for so many machines.")] = None,
    memory_per_machine: Annotated[str, typer.Option(help="Of each, as 64GB.")] = "64GB",
    link: Annotated[str, typer.Option(help="Between them: 10Gb/s, ethernet10, thunderbolt5 ...")] = "10Gb/s",
    tflops: Annotated[float, typer.Option(help="10^12 operations a second that training reaches on each.")] = 10.0,
) -> None:
    """Predict the memory of a training step by part, and the largest batch and length that fit.

    No weights are read or made. Ends with status 2, naming settings that fit, when the step as asked does not.
    With --mesh for each process of a run, with --machines for every mesh that they could make, best first.
    """
    from mlxlm.errors import UsageError
    from mlxlm.training import plan as plans

    if limit_gb is not None and limit_gb <= 0:
        raise UsageError(f"--limit-gb is {limit_gb:g}; expected a number above 0")
    settings = plans.PlanSettings(
        batch_size=batch_size, accumulation=grad_accumulation_steps, length=max_seq_length,
        target_length=target_length, dtype=dtype, master_weights=master_weights, average=ema, optimizer=optimizer,
        recompute_layers=recompute_layers, chunk=loss_chunk,
    )  # fmt: skip
    network = _adapted(_built(model, quantized), method, rank=rank, targets=targets)
    if machines is not None or mesh is not None or zero:
        from mlxlm.cli.plan_mesh import show_mesh, show_recommendation

        if machines is None:
            show_mesh(network, settings, mesh, zero, schedule)
            return
        if mesh is not None or zero:
            raise UsageError("--machines looks for the mesh and for zero itself; leave out --mesh and --zero, or it")
        show_recommendation(network, settings, schedule, machines, memory_per_machine, link, tflops)
        return
    limit = plans.working_set() if limit_gb is None else int(limit_gb * 1e9)
    made = plans.predict(network, settings)
    for name, size in made.parts().items():
        print(f"{name.replace('_', ' '):16}{plans.readable(size):>12}")
    print(f"{'peak':16}{plans.readable(made.peak):>12}  of {plans.readable(limit)}")
    for label, choice in (("as asked", settings), ("all recomputed", replace(settings, recompute_layers=-1))):
        rows = plans.largest(network, choice, "batch_size", limit)
        length = plans.largest(network, choice, "length", limit)
        print(f"largest, {label}: {rows} rows of {max_seq_length} tokens, or {batch_size} rows of {length}")
    plans.check(network, settings, limit)


def _built(model: str, bits: int | None) -> Transformer:
    """The model of a checkpoint directory, .gguf file, hub id or config.json; no weights are read or computed."""
    from mlx import nn

    from mlxlm import runtime
    from mlxlm.errors import UsageError
    from mlxlm.models import Transformer

    config, form = _described(model)
    built = Transformer(config)
    if bits is None and (form is None or runtime.backend() == "cpu"):  # on the CPU weights are loaded as floats
        return built
    bits, group = bits or form[0], form[1] if form else 64
    if bits not in (2, 3, 4, 5, 6, 8):
        raise UsageError(f"--quantized is {bits}; expected 2, 3, 4, 5, 6 or 8 bits")
    nn.quantize(
        built, group, bits,
        class_predicate=lambda name, module: hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0,
    )  # fmt: skip
    return built


def _described(model: str) -> tuple[TransformerConfig, tuple[int, int] | None]:
    """Its config, and (bits, group size) of most of its weights, None where they are floats."""
    from mlxlm.checkpoint import read_json, resolve_model
    from mlxlm.models.families import family_of
    from mlxlm.models.loading import open_model

    path = Path(model)
    if path.suffix != ".json":
        path = Path(resolve_model(model))
    if path.suffix.lower() == ".gguf":
        opened = open_model(path)
        forms = Counter((form.bits, form.group_size) for form in opened.quantizations.values())
        return opened.source.config, max(forms, key=forms.__getitem__, default=None)
    values = read_json(path if path.suffix == ".json" else path / "config.json")
    form: dict[str, Any] = values.get("quantization") or {}
    return family_of(values).read_config(values), (form["bits"], form.get("group_size", 64)) if form else None


def _adapted(network: Transformer, method: str, **given: Any) -> Transformer:
    """The model as a method trains it.  given: settings of the method, None for its own."""
    from mlxlm import peft
    from mlxlm.errors import UsageError, nearest

    if method not in peft.METHODS:
        raise UsageError(f"unknown method {method!r}{nearest(method, peft.METHODS)}")
    kind = peft.METHODS[method]
    wanted = {name: value for name, value in given.items() if value is not None}
    without = [name for name in wanted if name not in kind.__dataclass_fields__]
    if without:
        raise UsageError(f"--{without[0]} is for low-rank adapters; the method {method} has none")
    if "targets" in wanted:
        wanted["targets"] = tuple(name.strip() for name in wanted["targets"].split(","))
    peft.apply(network, kind(**wanted))
    return network
