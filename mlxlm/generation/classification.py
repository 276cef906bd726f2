"""Labels of texts, or of the words in them, by a model with a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxlm.data import IGNORE, Encoding, Example, check_rows, encode_rows, pad_examples
from mlxlm.errors import DataError, PromptError, UnsupportedModelError, UsageError
from mlxlm.models import SequenceHeadSpec, SpanHeadSpec, TokenHeadSpec

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


@dataclass(frozen=True)
class Classified:
    """What a classifier says of a text.  label: the likeliest.  probabilities: of all labels, likeliest first."""

    label: str
    probabilities: dict[str, float]

    @property
    def probability(self) -> float:
        """Of the likeliest label."""
        return self.probabilities[self.label]


def head_labels(model: Transformer) -> tuple[str, ...]:
    """Names of a model's labels in order, () for a model whose head is not for labels."""
    head = model.config.head
    return head.labels if isinstance(head, TokenHeadSpec) and not isinstance(head, SpanHeadSpec) else ()


def classify(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pairs: Sequence[str] | None = None,
    batch_size: int = 32,
    truncate: bool = False,
) -> list[Classified]:
    """The label of each text, in the order given.

    pairs: a second text for each, for models of pairs (entailment, say).  batch_size: texts at once, of like length.
    truncate: cut texts that are longer than the model's context, default False.

    Raises UnsupportedModelError for a model without a head over sequences, PromptError for an empty text, DataError
    for one that is too long.
    """
    labels = head_labels(model)
    if not labels or not isinstance(model.config.head, SequenceHeadSpec):
        raise UnsupportedModelError(_no_head(model, "whole texts"))
    if isinstance(texts, str) or isinstance(pairs, str):
        raise UsageError("texts is one string; give a list of strings")
    if pairs is not None and len(pairs) != len(texts):
        raise UsageError(f"{len(texts)} texts but {len(pairs)} pairs")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise PromptError(f"text {number} is empty")
    if not texts:
        return []
    pairs = [None] * len(texts) if pairs is None else pairs  # type: ignore[list-item]
    rows = [{"text": text, "label": labels[0], "pair": pair} for text, pair in zip(texts, pairs, strict=True)]
    examples = _encoded(model, tokenizer, rows, labels, truncate)
    found = []
    for logits in label_logits(model, examples, batch_size=batch_size):
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        order = np.argsort(-chances, kind="stable")
        found.append(Classified(labels[order[0]], {labels[i]: float(chances[i]) for i in order}))
    return found


def tag(
    model: Transformer,
    tokenizer: Tokenizer,
    sentences: Sequence[Sequence[str]],
    *,
    batch_size: int = 32,
    truncate: bool = False,
) -> list[list[str | None]]:
    """The label of each word of each sentence, a list of words; None for words that truncation has cut off.

    Arguments and errors as for `classify`, for models with a head over tokens. A word's label is that of its first
    token.
    """
    labels = head_labels(model)
    if not labels or isinstance(model.config.head, SequenceHeadSpec):
        raise UnsupportedModelError(_no_head(model, "the words of a text"))
    if not sentences:
        return []
    rows: list[dict[str, Any]] = [{"tokens": list(words), "labels": [labels[0]] * len(words)} for words in sentences]
    examples = _encoded(model, tokenizer, rows, labels, truncate)
    found: list[list[str | None]] = []
    logits = label_logits(model, examples, batch_size=batch_size)
    for words, example, scores in zip(sentences, examples, logits, strict=True):
        mine: list[str | None] = [labels[row.argmax()] for row in scores[marked(example)]]
        found.append(mine + [None] * (len(words) - len(mine)))
    return found


def label_logits(model: Transformer, examples: Sequence[Example], *, batch_size: int = 32) -> list[np.ndarray]:
    """Logits of each example in the order given, float32: (labels,), or (tokens, labels) of a head over tokens."""
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1")
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    result: list[np.ndarray] = [np.empty(0)] * len(examples)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = pad_examples([examples[index] for index in part], max_length=2**31 - 1, multiple=8)
        inputs = {name: mx.array(array) for name, array in batch.items() if name not in ("tokens", "labels")}
        logits = np.array(model(mx.array(batch["tokens"]), **inputs).astype(mx.float32))
        for row, index in enumerate(part):
            of_tokens = logits.ndim == 3
            result[index] = logits[row, : len(examples[index].tokens)] if of_tokens else logits[row]
    return result


def marked(example: Example) -> np.ndarray:
    """Places of the tokens that have a label of their own: the first of each word."""
    return np.flatnonzero(np.array(example.label) != IGNORE)


def _encoded(
    model: Transformer, tokenizer: Tokenizer, rows: list[dict[str, Any]], labels: tuple[str, ...], truncate: bool
) -> list[Example]:
    table = model.config.embeddings.positions
    limit = model.config.max_length if table is None or table.limit is None else table.limit
    encoding = Encoding(
        max_length=2**31 - 1 if limit is None else limit - model.virtual_length,
        truncation="cut-right" if truncate else "error",
        labels=labels,
        token_types=model.config.embeddings.num_token_types > 1,
    )
    checked = check_rows("the input", ((f"text {number}", row) for number, row in enumerate(rows, 1)))
    examples, _ = encode_rows(checked, tokenizer, encoding)
    if len(examples) != len(rows):
        raise DataError("a text has no word left to label once it is cut")
    return examples


def _no_head(model: Transformer, what: str) -> str:
    head = model.config.head
    has = "none" if head is None else "one over words" if model.config.predicts_words else "one of another kind"
    return (
        f"labels of {what} need a classification head, and this model has {has}; `mlxlm finetune` with rows that have "
        "labels makes one"
    )
