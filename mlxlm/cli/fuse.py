"""`mlxlm fuse`: put an adapter into the weights of its model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mlxlm.cli import options as opt


def fuse(
    adapter_path: Annotated[
        list[str],
        typer.Option(
            "--adapter-path",
            metavar="FOLDER",
            help="The adapter to merge; several, as FOLDER=WEIGHT, are added up.",
        ),
    ],
    save_path: Annotated[
        str, typer.Option("--save-path", "--output", "-o", metavar="FOLDER", help="Where the fused model goes.")
    ],
    model: opt.ModelOrShipped = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize/--dequantize",
            help="Of a quantized model: quantize the changed weights again, or (default) write all weights as floats.",
        ),
    ] = False,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
) -> None:
    """Merge adapters into their model and save the result: an ordinary model with their answers.

    Quantizing again loses a part of the adapter's change; the report on stderr says how much of it.
    """
    from mlxlm.models import save
    from mlxlm.peft import merge

    network, tokenizer = opt.load(model or opt.shipped_model(), dtype, revision, adapter_path, quantized=requantize)
    report = merge(network, requantize=requantize)
    if report.errors:
        place = max(report.errors, key=lambda path: report.errors[path])
        print(
            f"warning: quantizing again lost {report.mean:.2f} of the adapter's change on average and "
            f"{report.worst:.2f} in {place} (norm of the loss by norm of the change); --dequantize loses nothing",
            file=sys.stderr,
        )
    save(network, tokenizer, save_path)
    print(f"{len(report.merged)} modules merged; the model is in {save_path}", file=sys.stderr)
