"""`mlxlm classify`: labels of texts, or of their words."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from mlxlm.cli import options as opt
from mlxlm.errors import UsageError


def classify(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to label.")] = None,
    model: opt.ModelOrShipped = None,
    input: Annotated[
        str | None,
        typer.Option(
            "--input", "-i", help='JSONL with rows {"text"}, {"text", "pair"} or {"tokens"}; - is standard input.'
        ),
    ] = None,
    adapter_path: opt.AdapterPath = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts at once.")] = 32,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts longer than the model's context.")] = False,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
) -> None:
    """Label texts: label, probability and text, tab-separated. From --input: the rows as JSON with what was found.

    A model whose head is over tokens labels every word: word and label joined by a slash, or "predicted" in JSON.
    """
    from mlxlm.data import read_jsonl
    from mlxlm.generation import classify as classify_texts
    from mlxlm.generation import head_labels, tag
    from mlxlm.models import SequenceHeadSpec

    if bool(texts) == (input is not None):
        raise UsageError("give either texts or --input, one of both")
    rows: list[dict[str, Any]] = [{"text": text} for text in texts or ()] or list(read_jsonl(str(input)))
    network, tokenizer = opt.load(model or opt.shipped_model(), dtype, revision, adapter_path)
    options: dict[str, Any] = {"batch_size": batch_size, "truncate": truncate}
    start = time.perf_counter()
    if head_labels(network) and not isinstance(network.config.head, SequenceHeadSpec):
        sentences = [row.get("tokens") or _field(row, number).split() for number, row in enumerate(rows, 1)]
        for row, words, labels in zip(rows, sentences, tag(network, tokenizer, sentences, **options), strict=True):
            pairs = zip(words, labels, strict=True)
            print(" ".join(f"{word}/{label}" for word, label in pairs) if texts else _json(row, predicted=labels))
    else:
        pairs = [row.get("pair") for row in rows]
        if len({pair is None for pair in pairs}) > 1:
            raise UsageError("some rows have a pair and some have none")
        second: Any = None if pairs[0] is None else pairs
        given = [_field(row, number) for number, row in enumerate(rows, 1)]
        for row, one in zip(rows, classify_texts(network, tokenizer, given, pairs=second, **options), strict=True):
            if texts:
                print(f"{one.label}\t{one.probability:.4f}\t{row['text']}")
            else:
                print(_json(row, predicted=one.label, probability=round(one.probability, 6)))
    seconds = time.perf_counter() - start
    print(f"{len(rows)} texts, {len(rows) / seconds:.1f} texts/s", file=sys.stderr)


def _json(row: dict[str, Any], **more: Any) -> str:
    return json.dumps({**row, **more}, ensure_ascii=False)


def _field(row: dict[str, Any], number: int) -> str:
    if not isinstance(row.get("text"), str):
        raise UsageError(f"row {number} has no text; its keys: {', '.join(map(str, row))}")
    return row["text"]
