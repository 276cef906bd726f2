"""Evaluation on rows of data: what is measured follows from their format.

text                      perplexity with sliding windows, bits per byte
classification, tagging   accuracy, balanced accuracy, macro F1, F1 of entities
completion, chat, seq2seq perplexity of the right answers, and how many generated ones are exactly right
choices, preference       how often the right one is the likeliest
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlxlm.data import Encoding, Example, Rows, encode_rows
from mlxlm.errors import UsageError, nearest
from mlxlm.generation.choice import NORMALIZATIONS, Normalization, answer_example, normalized
from mlxlm.generation.classification import classify, head_labels, tag
from mlxlm.generation.decoding import batch_generate
from mlxlm.generation.label_scores import score_labels
from mlxlm.generation.perplexity import perplexity
from mlxlm.generation.scoring import Progress, context_limit, cut_left, score_examples
from mlxlm.generation.steps import check_generates

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

_ENDLESS = 2**31 - 1
_ROOM = 16  # tokens of an answer beyond those of the longest right one
_TOLD = 8  # batches of answers after which progress is told


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How to measure.

    batch_size: rows at once, default 8; results don't depend on it but by rounding.  truncate: cut rows that are too
    long, prompts on the left and labelled texts on the right; default False: an error.  window, stride: of texts, see
    `perplexity`.  max_tokens: of a generated answer, default 16 more than the longest right one has, since a longer one
    can't match.  generate: answers too, not only their perplexity, default True.  normalize: the likelihood of choices
    by length, "none", "tokens" or "bytes", default "bytes".
    """

    batch_size: int = 8
    truncate: bool = False
    window: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    generate: bool = True
    normalize: Normalization = "bytes"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.normalize not in NORMALIZATIONS:
            raise UsageError(f"unknown normalization {self.normalize!r}{nearest(self.normalize, NORMALIZATIONS)}")


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """What was measured.  format: of the rows.  count: of them.  values: by name.  predicted: one a row, with what the
    model answered; empty for texts.  notes: what a reader of the values should know.
    """

    format: str
    count: int
    values: dict[str, Any]
    predicted: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def evaluate_rows(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Rows,
    settings: EvaluationSettings | None = None,
    *,
    progress: Progress | None = None,
) -> RowScores:
    """Measure a model on rows of one format.

    progress: told what is being done, and how much of it, where that may take long.
    Raises DataError for rows that the model can't read, UnsupportedModelError for a model without the head they need.
    """
    settings = settings or EvaluationSettings()
    values = [dict(row) for _, row in rows.rows]
    if rows.format == "text":
        found = perplexity(
            model, tokenizer, [row["text"] for row in values],
            window=settings.window, stride=settings.stride, batch_size=settings.batch_size, progress=progress,
        )  # fmt: skip
        numbers = {
            "loss": found.loss, "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte,
            "tokens": found.tokens, "bytes": found.bytes, "window": found.window, "stride": found.stride,
        }  # fmt: skip
        return RowScores(format=rows.format, count=len(rows), values=numbers)
    if rows.format in ("classification", "tagging"):
        return _labels(model, tokenizer, rows, values, settings)
    if rows.format in ("choices", "preference"):
        return _choices(model, tokenizer, rows, values, settings, progress)
    return _answers(model, tokenizer, rows, values, settings, progress)


def _labels(
    model: Transformer, tokenizer: Tokenizer, rows: Rows, values: list[dict[str, Any]], settings: EvaluationSettings
) -> RowScores:
    options: dict[str, Any] = {"batch_size": settings.batch_size, "truncate": settings.truncate}
    known = set(head_labels(model))
    predicted: list[Any]
    if rows.format == "tagging":
        predicted = tag(model, tokenizer, [row["tokens"] for row in values], **options)
        right = [[str(label) for label in row["labels"]] for row in values]
        named = {label for row in right for label in row}
        cut = sum(label is None for row in predicted for label in row)
        # A word that was cut off has no label, which is never right.
        scores = score_labels(right, [[label or "" for label in row] for row in predicted])
        notes = [f"{cut} words were cut off and count as wrong"] if cut else []
    else:
        pairs = [row.get("pair") for row in values]
        if len({pair is None for pair in pairs}) > 1:
            raise UsageError(f"{rows.name}: some rows have a pair and some have none")
        second: Any = None if pairs[0] is None else pairs
        predicted = [
            one.label for one in classify(model, tokenizer, [row["text"] for row in values], pairs=second, **options)
        ]
        right, notes = [str(row["label"]) for row in values], []
        named = set(right)
        scores = score_labels(right, predicted)
    strange = sorted(named - known)
    if strange:
        raise UsageError(f"{rows.name}: the model has no label {strange[0]!r}{nearest(strange[0], known)}")
    numbers = {**scores.to_json(), "labels": scores.count}
    return RowScores(format=rows.format, count=len(rows), values=numbers, predicted=predicted, notes=notes)


def _choices(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Rows,
    values: list[dict[str, Any]],
    settings: EvaluationSettings,
    progress: Progress | None,
) -> RowScores:
    """All choices of all rows are scored together. Between prompt and choice stands a space, unless one of them has
    white space there; of an encoder-decoder the encoder reads the prompt.
    """
    check_generates(model)
    if rows.format == "preference":
        values = [{**row, "choices": [row["chosen"], row["rejected"]], "answer": row["chosen"]} for row in values]
    limit = context_limit(model) if settings.truncate else None
    examples, texts, cut = [], [], 0
    for (where, _), row in zip(rows.rows, values, strict=True):
        for choice in row["choices"]:
            gap = "" if row["prompt"][-1:].isspace() or choice[:1].isspace() or model.config.has_memory else " "
            example = replace(answer_example(model, tokenizer, row["prompt"], gap + choice), where=where)
            fitted = example if limit is None else cut_left(example, limit)
            cut += len(fitted.tokens) < len(example.tokens)
            examples.append(fitted)
            texts.append(choice)
    found = score_examples(model, examples, batch_size=settings.batch_size, what="choices to score", progress=progress)
    scores = iter(zip(texts, examples, found, strict=True))
    predicted: list[Any] = []
    right, chance = 0, []
    for row in values:
        mine = [normalized(*next(scores), settings.normalize) for _ in row["choices"]]
        best = max(range(len(mine)), key=lambda index: mine[index].score)
        named = isinstance(row["answer"], str)
        predicted.append(row["choices"][best] if named else best)  # as the row itself gives the answer
        right += predicted[-1] == row["answer"]
        chance.append(1 / len(mine))
    numbers = {
        "accuracy": right / len(values), "chance": math.fsum(chance) / len(chance), "normalize": settings.normalize
    }  # fmt: skip
    notes = [f"{cut} of {len(examples)} prompts with a choice were cut on the left"] if cut else []
    return RowScores(format=rows.format, count=len(rows), values=numbers, predicted=predicted, notes=notes)


def _answers(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Rows,
    values: list[dict[str, Any]],
    settings: EvaluationSettings,
    progress: Progress | None,
) -> RowScores:
    """Perplexity of the right answers (of a chat the assistant's last turn), and exact matches of generated ones."""
    check_generates(model)
    limit = context_limit(model)
    encoding = Encoding(
        max_length=_ENDLESS if limit is None else limit,
        truncation="cut-left" if settings.truncate else "error",
        loss_on="completion",
        seq2seq=model.config.has_memory,
    )
    examples, report = encode_rows(rows, tokenizer, encoding)
    notes = [str(report)] if report.cut or report.dropped_empty else []
    scores = score_examples(
        model, examples, batch_size=settings.batch_size, what="right answers to score", progress=progress
    )
    count = sum(score.count for score in scores)
    loss = -math.fsum(score.log_probability for score in scores) / count
    numbers: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": count}
    if not settings.generate:
        return RowScores(format=rows.format, count=len(rows), values=numbers, notes=notes)
    if len(examples) != len(values):
        raise UsageError(f"{rows.name}: rows without an answer can't be matched; {report}")
    longest = max(score.count for score in scores)
    most = longest + _ROOM if settings.max_tokens is None else settings.max_tokens
    what = f"answers to generate, of at most {most} tokens (the longest right one has {longest})"
    predicted: list[str] = []
    while len(predicted) < len(examples):
        if progress is not None:
            progress(what, len(predicted), len(examples))
        part = examples[len(predicted) : len(predicted) + _TOLD * settings.batch_size]
        predicted += batch_generate(
            model, tokenizer, [_prompt(one) for one in part], max_tokens=most, batch_size=settings.batch_size
        )
    numbers["max_tokens"] = most
    right = sum(answer.strip() == _expected(row).strip() for answer, row in zip(predicted, values, strict=True))
    numbers["exact_match"] = right / len(values)
    return RowScores(format=rows.format, count=len(rows), values=numbers, predicted=predicted, notes=notes)


def _prompt(example: Example) -> list[int]:
    """What stands before the answer."""
    return example.tokens if example.target is not None else example.tokens[: example.scored.index(True)]


def _expected(row: dict[str, Any]) -> str:
    if "messages" in row:
        last = next(message for message in reversed(row["messages"]) if message["role"] == "assistant")
        if not isinstance(last.get("content"), str):
            raise UsageError(
                "the last answer of a chat is no plain text, so nothing can be matched with it; use --no-generate"
            )
        return last["content"]
    return row["completion"] if "completion" in row else row["target"]


def as_predictions(rows: Rows, predicted: Sequence[Any]) -> list[dict[str, Any]]:
    """The rows with the key "predicted"."""
    return [{**row, "predicted": one} for (_, row), one in zip(rows.rows, predicted, strict=True)]
