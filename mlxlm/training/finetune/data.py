"""The rows of a fine-tuning run: what kind of task they are, which are held out, and their examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mlxlm import runtime
from mlxlm.data import (
    FORMATS,
    Encoding,
    Example,
    Report,
    Rows,
    SupervisedSource,
    encode_rows,
    label_names,
    read_splits,
    renaming,
)
from mlxlm.errors import DataError, UnsupportedModelError, UsageError
from mlxlm.models import Transformer, TransformerConfig

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer
    from mlxlm.training.finetune.settings import FinetuneSettings

Kind = Literal["words", "seq2seq", "sequence", "tokens"]
_LEAST_TO_SPLIT = 10  # rows below which none is held out
_MOST_HELD_OUT = 500
_LONGEST = 2048  # default of max_seq_length, where the context is longer


def read_rows(settings: FinetuneSettings) -> tuple[dict[str, Rows], list[str]]:
    """The rows of each split, and what was done to them, in sentences. Without validation rows some are held out."""
    splits = read_splits(settings.data, settings.columns)
    if "train" not in splits:
        raise DataError(f"{settings.data} has no train rows; it has {', '.join(splits)}")
    said = []
    train = splits["train"]
    if "valid" not in splits and settings.valid_fraction:
        count = min(round(settings.valid_fraction * len(train)), _MOST_HELD_OUT)
        if len(train) < _LEAST_TO_SPLIT or not count:
            said.append(f"{len(train)} rows are too few to hold any out: there is no validation")
        else:
            order = np.random.default_rng((settings.seed, 1)).permutation(len(train))
            parts = {"valid": sorted(order[:count].tolist()), "train": sorted(order[count:].tolist())}
            for split, chosen in parts.items():
                splits[split] = Rows(f"{train.name} ({split})", train.format, [train.rows[i] for i in chosen])
            said.append(
                f"no validation file: {count} of {len(train)} rows are held out (valid_fraction "
                f"{settings.valid_fraction:g})"
            )
    return {split: splits[split] for split in ("train", "valid", "test") if split in splits}, said


def passed_over(rows: Rows) -> list[str]:
    """A sentence where the first row has columns that another format would learn from under other names, else none."""
    hint = renaming(rows.rows[0][1])
    unread = [name for name in rows.rows[0][1] if name not in FORMATS[rows.format].keys]
    return [f"rows are taken for {rows.format}, without {', '.join(unread)}{hint}"] if hint else []


def kind_of(form: str, config: TransformerConfig) -> Kind:
    """What is learned from rows of a format by a model. Raises an error where the two don't go together."""
    if form == "prompt":
        raise DataError(
            "the rows have a prompt and no completion; to learn without answers is for `mlxlm align`. An answer under "
            "another name is given by --columns completion=NAME"
        )
    if form in ("preference", "ranking"):
        raise DataError(
            "rows with chosen and rejected answers, or ranked ones, are for preference learning (mlxlm align), not for "
            "fine-tuning"
        )
    if form == "tagging":
        return "tokens"
    if config.has_memory:
        return "seq2seq"
    if form == "classification":
        return "sequence"
    if config.decoder is None:
        raise UnsupportedModelError(
            f"an encoder learns labels, and these rows ({form}) have none; give rows with text and label or tokens and "
            "labels, or go on with its pretraining by `mlxlm pretrain`"
        )
    if config.fills_blanks:
        raise UnsupportedModelError(
            "a model that fills blanks learns from text by `mlxlm pretrain`; here it takes rows with labels"
        )
    return "words"


def as_pairs(rows: Rows) -> Rows:
    """Labelled rows as source and target, for an encoder-decoder, which writes the label (Raffel et al. 2020, T5)."""
    if rows.format != "classification":
        return rows
    pairs = []
    for where, row in rows.rows:
        source = row["text"] if row.get("pair") is None else f"{row['text']} {row['pair']}"
        pairs.append((where, {"source": source, "target": str(row["label"])}))
    return Rows(rows.name, "seq2seq", pairs)


@dataclass
class Examples:
    """The examples of a run.

    kind: what is learned.  labels: names, () for words.  splits: by name, in order.  reports: what became of the rows.
    max_length: tokens of one.  decoder_start: of an encoder-decoder.
    """

    kind: Kind
    labels: tuple[str, ...]
    splits: dict[str, list[Example]]
    reports: dict[str, Report]
    max_length: int
    decoder_start: int | None

    @property
    def longest(self) -> int:
        """Tokens of the longest training example, a target counted by itself."""
        return max(len(example.tokens) for example in self.splits["train"])

    @property
    def longest_target(self) -> int | None:
        """Tokens of the longest target of an encoder-decoder."""
        lengths = [len(example.target) for example in self.splits["train"] if example.target is not None]
        return max(lengths, default=None)

    def label_counts(self) -> dict[str, int]:
        """How often each label is in the training examples."""
        counts = dict.fromkeys(self.labels, 0)
        for example in self.splits["train"]:
            for label in example.label if isinstance(example.label, list) else [example.label]:
                if label is not None and label >= 0:
                    counts[self.labels[label]] += 1
        return counts

    def source(self, settings: FinetuneSettings) -> SupervisedSource:
        """The batches to train on."""
        epochs = None if settings.iters is not None else settings.epochs or 3
        return SupervisedSource(
            self.splits["train"], settings.batch_size, max_length=self.max_length, epochs=epochs, seed=settings.seed,
            packing=settings.packing, decoder_start=self.decoder_start, multiple=_multiple(),
        )  # fmt: skip

    def measured(self, split: str, settings: FinetuneSettings) -> list[Example]:
        """The examples of a split that are measured: all, or of the validation rows as many batches as wanted."""
        if split == "valid" and settings.val_batches > 0:
            return self.splits[split][: settings.val_batches * settings.batch_size]
        return self.splits[split]

    def measuring(self, split: str, settings: FinetuneSettings) -> Callable[[], SupervisedSource]:
        """What makes a fresh source over those, sorted by length, which changes no sum and saves padding."""
        examples = self.measured(split, settings)
        ordered = sorted(examples, key=lambda example: max(len(example.tokens), len(example.target or ())))
        return lambda: SupervisedSource(
            ordered, settings.batch_size, max_length=self.max_length, epochs=1, shuffle=False, packing=settings.packing,
            decoder_start=self.decoder_start, multiple=_multiple(),
        )  # fmt: skip


def _multiple() -> int:
    """Padded lengths are multiples of it: large where a step is compiled for each of them, small where none is."""
    return 8 if runtime.backend() == "cpu" else 32


def encode(
    splits: Mapping[str, Rows],
    kind: Kind,
    labels: tuple[str, ...],
    model: Transformer,
    tokenizer: Tokenizer,
    settings: FinetuneSettings,
) -> Examples:
    """All rows as examples for a model that has its head and its adapter. Raises DataError for rows that can't be."""
    if settings.packing and kind != "words":
        raise UsageError("packing is for the words of a decoder; labels and source-target pairs are padded")
    _check_used(splits["train"].format, kind, tokenizer, settings)
    limit = length_limit(model, settings.max_seq_length)
    encoding = Encoding(
        max_length=limit, truncation=settings.truncation, loss_on=settings.loss_on, seq2seq=kind == "seq2seq",  # type: ignore[arg-type]
        labels=labels, token_types=model.config.embeddings.num_token_types > 1,
        variables=settings.chat_template_config,
    )  # fmt: skip
    found: dict[str, list[Example]] = {}
    reports: dict[str, Report] = {}
    for split, rows in splits.items():
        found[split], reports[split] = encode_rows(rows, tokenizer, encoding)
    return Examples(kind, labels, found, reports, limit, model.config.decoder_start)


def _check_used(form: str, kind: Kind, tokenizer: Tokenizer, settings: FinetuneSettings) -> None:
    """Raise UsageError for settings that would have no effect on rows of a format."""
    if settings.loss_on != "assistant" and (kind != "words" or (form == "text" and settings.loss_on != "all")):
        what = {"words": "rows of text alone", "seq2seq": "an encoder-decoder"}.get(kind, "labels")
        raise UsageError(f"loss_on {settings.loss_on} (or mask_prompt) has no effect on {what}; leave it out")
    templates = kind == "words" and (form == "chat" or (form != "text" and tokenizer.chat_template is not None))
    if settings.chat_template_config and not templates:
        why = "the model has none" if kind == "words" and form != "text" else f"{form} rows need none"
        raise UsageError(f"chat_template_config is for a chat template, and {why}; leave it out")


def length_limit(model: Transformer, wanted: int | None) -> int:
    """Tokens of an example, virtual ones left out. Raises UsageError for more than a table of positions has."""
    virtual, table = model.virtual_length, model.config.embeddings.positions
    hard = None if table is None else table.limit
    if wanted is not None:
        if hard is not None and wanted + virtual > hard:
            beside = f" beside {virtual} virtual tokens" if virtual else ""
            raise UsageError(f"max_seq_length is {wanted}, but this model has {hard - virtual} positions{beside}")
        return wanted
    context = model.config.max_length
    return _LONGEST if context is None else min(_LONGEST, context - virtual)


def names_of_labels(splits: Mapping[str, Rows], kind: Kind) -> tuple[str, ...]:
    """Names of the labels in the training rows, () where none is learned. Raises DataError for a single one."""
    if kind not in ("sequence", "tokens"):
        return ()
    names = label_names(splits["train"])
    if len(names) < 2:
        raise DataError(
            f"{splits['train'].name}: all rows have the label {names[0]!r}, so there is nothing to tell apart"
        )
    return names


def described(splits: Mapping[str, Rows], examples: Examples) -> list[str]:
    """Lines about the data: rows of each split, labels, lengths, and what was cut or dropped, or that nothing was."""
    rows = ", ".join(f"{split} {len(rows)}" for split, rows in splits.items())
    lines = [f"{splits['train'].format} rows: {rows}"]
    if examples.labels:
        counts = examples.label_counts()
        shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:8])
        lines[0] += f"; labels: {shown}{' ...' if len(counts) > 8 else ''}"
    reports = examples.reports.values()
    unlike = [report for report in reports if report.cut or report.dropped_long or report.dropped_empty or report.split]
    if unlike:
        return lines + [str(report) for report in unlike]
    longest, first = max(report.longest for report in reports), examples.reports["train"]
    whole = f"nothing cut or dropped (policy {first.truncation})"
    return [*lines, f"{first.tokens:,} tokens to train on, longest {longest} of at most {first.max_length}; {whole}"]


def question(example: Example) -> tuple[list[int], list[int]] | None:
    """A prompt and the answer wanted, as tokens, of an example of words; None where there is nothing to ask.

    The answer is the last stretch that is learned; where everything is, the text after its first third.
    """
    if example.target is not None:
        return example.tokens, example.target
    if example.label is not None:
        return None
    end = len(example.tokens)
    while end and not example.scored[end - 1]:
        end -= 1
    start = end
    while start and example.scored[start - 1]:
        start -= 1
    if start <= 1:
        start = max(1, min(end // 3, 32))
    return (example.tokens[:start], example.tokens[start:end]) if start < end else None
