"""`mlxlm embed`: sentence embeddings."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import typer

from mlxlm.cli import options as opt
from mlxlm.errors import UsageError

# Rows held at once: enough to sort them by length, whatever the size of the file.
_ROWS = 4096


def embed(
    model: opt.Model,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to embed.")] = None,
    input: Annotated[
        str | None, typer.Option("--input", "-i", help='JSONL file with rows {"text": ...}; - is standard input.')
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="JSONL file; default standard output.")] = None,
    pooling: Annotated[
        str | None, typer.Option("--pooling", help="mean, cls or last; default what the checkpoint says, else mean.")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize/--no-normalize", help="Scale vectors to length 1.")] = True,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts at once.")] = 32,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts longer than the model's context.")] = False,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
) -> None:
    """Turn texts into vectors: one JSON row a text, the row's own fields and "embedding"."""
    from mlxlm.data import read_jsonl
    from mlxlm.generation import embed as embed_texts

    if bool(texts) == (input is not None):
        raise UsageError("give either texts or --input, one of both")
    rows: Iterator[dict[str, Any]]
    rows = iter({"text": text} for text in texts) if texts else read_jsonl(str(input), field="text")
    target = opt.Output(output)  # refuses before anything is computed
    network, tokenizer = opt.load(model, dtype, revision)
    start, count = time.perf_counter(), 0
    with target as file:
        while part := list(islice(rows, _ROWS)):
            vectors = embed_texts(
                network,
                tokenizer,
                [row["text"] for row in part],
                pooling=pooling,
                normalize=normalize,
                batch_size=batch_size,
                truncate=truncate,
            )
            for row, vector in zip(part, vectors, strict=True):
                print(
                    json.dumps({**row, "embedding": [round(float(x), 7) for x in vector]}, ensure_ascii=False),
                    file=file,
                )
            count += len(part)
    seconds = time.perf_counter() - start
    print(f"{count} texts, {count / seconds:.1f} texts/s, {network.config.dim} features", file=sys.stderr)
