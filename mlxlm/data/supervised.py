"""Supervised examples: rows as tokens with marks on what is to be learned, and what happens to those that are too long.

Formats of rows are in `supervised_rows`, the assistant's turns of chats in `supervised_chat`, batches in
`supervised_batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mlxlm.data.batch import IGNORE
from mlxlm.data.supervised_chat import LOSS_ON, LossOn, Scored, encode_chat_turns, encode_pieces, with_end
from mlxlm.data.supervised_rows import Row, Rows, renaming
from mlxlm.errors import DataError, UsageError, listing, nearest

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer

Truncation = Literal["error", "drop", "cut-left", "cut-right"]
TRUNCATIONS = ("error", "drop", "cut-left", "cut-right")


@dataclass(frozen=True)
class Example:
    """One example of training.

    tokens: that the model reads, an encoder's where there is a decoder besides.  scored: for each token whether it is
    to be predicted; all False where something else is.  target: what a decoder behind an encoder is to write.
    label: number of the class, or one a token, -100 for none.  where: the row it comes from.
    """

    tokens: list[int]
    scored: list[bool]
    target: list[int] | None = None
    label: int | list[int] | None = None
    types: list[int] | None = None
    where: str = ""

    @property
    def num_targets(self) -> int:
        """How many things are learned from it. A decoder's first token is predicted by nothing."""
        if self.target is not None:
            return len(self.target)
        if self.label is not None:
            return 1 if isinstance(self.label, int) else sum(label != IGNORE for label in self.label)
        return sum(self.scored[1:])


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How rows become examples.

    max_length: tokens of an example, and of a decoder's target.  truncation: of longer ones: "error", "drop" the
    example, "cut-left" its beginning or "cut-right" its end, default "cut-right".  loss_on: see `encode_chat_turns`;
    for prompts with completions "assistant" and "completion" are the same.  seq2seq: the model has an encoder and a
    decoder.  labels: names of the classes in order.  chat: give prompts with completions as a chat where the tokenizer
    has a template, default True.  variables: for the chat template.  token_types: the model tells a text from its pair
    by types of tokens, default True.
    """

    max_length: int
    truncation: Truncation = "cut-right"
    loss_on: LossOn = "assistant"
    seq2seq: bool = False
    labels: tuple[str, ...] = ()
    chat: bool = True
    variables: dict[str, Any] = field(default_factory=dict)
    token_types: bool = True

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UsageError(f"max_length is {self.max_length}, expected at least 2")
        for name, value, choices in (
            ("truncation", self.truncation, TRUNCATIONS),
            ("loss_on", self.loss_on, LOSS_ON),
        ):
            if value not in choices:
                raise UsageError(f"unknown {name} {value!r}{nearest(value, choices)}")


@dataclass
class Report:
    """What became of the rows: counts, to be printed. Nothing is cut or left out without being counted here."""

    name: str
    truncation: str
    max_length: int
    rows: int = 0
    examples: int = 0
    split: int = 0
    cut: int = 0
    dropped_long: int = 0
    dropped_empty: int = 0
    tokens: int = 0
    targets: int = 0
    longest: int = 0

    def __str__(self) -> str:
        text = (
            f"{self.name}: {self.rows} rows -> {self.examples} examples, {self.tokens} tokens, {self.targets} targets; "
            f"longest {self.longest} of at most {self.max_length} tokens; too long (policy {self.truncation}): "
            f"{self.cut} cut, {self.dropped_long} dropped; {self.dropped_empty} dropped without a target"
        )
        if self.split:
            text += (
                f"; {self.split} chats are trained one turn at a time, since their template rewrites earlier turns "
                "when later ones follow"
            )
        return text


def encode_rows(rows: Rows, tokenizer: Tokenizer, encoding: Encoding) -> tuple[list[Example], Report]:
    """All rows as examples no longer than allowed, and the report of what was cut or dropped.

    Raises DataError for a row that can't be encoded, one too long under the policy "error", and when nothing is left.
    """
    if rows.format not in _ENCODERS:
        purpose = "evaluation (mlxlm evaluate)" if rows.format == "choices" else "preference learning"
        hint = renaming(rows.rows[0][1])
        raise DataError(f"{rows.name}: rows of format {rows.format!r} are for {purpose}, not for this{hint}")
    report = Report(rows.name, encoding.truncation, encoding.max_length, rows=len(rows))
    examples: list[Example] = []
    for where, row in rows.rows:
        found = _ENCODERS[rows.format](row, where, tokenizer, encoding)
        report.split += len(found) > 1
        for example in found:
            fitted = _fit(replace(example, where=where), tokenizer, encoding, report)
            if fitted is not None and fitted.num_targets == 0:
                report.dropped_empty += 1
            elif fitted is not None:
                examples.append(fitted)
    if not examples:
        raise DataError(f"{rows.name}: no row is left to learn from ({report})")
    report.examples = len(examples)
    report.tokens = sum(len(example.tokens) + len(example.target or ()) for example in examples)
    report.targets = sum(example.num_targets for example in examples)
    return examples, report


def label_names(rows: Rows) -> tuple[str, ...]:
    """The classes that labelled rows name, whole numbers in order of size, else in alphabetical order.

    Raises DataError when whole numbers don't run from 0 on, or are mixed with text.
    """
    found: set[str | int] = set()
    for _, row in rows.rows:
        found.update(row["labels"] if rows.format == "tagging" else [row["label"]])
    numbers = sorted(label for label in found if isinstance(label, int))
    if numbers and (len(numbers) < len(found) or numbers != list(range(len(numbers)))):
        raise DataError(
            f"{rows.name}: labels must be names, or numbers from 0 without a gap; found {listing(map(str, found))}"
        )
    return tuple(map(str, numbers)) if numbers else tuple(sorted(str(label) for label in found))


def _fit(example: Example, tokenizer: Tokenizer, encoding: Encoding, report: Report) -> Example | None:
    """The example no longer than allowed, None when it is dropped."""
    limit = encoding.max_length
    length = max(len(example.tokens), len(example.target or ()))
    report.longest = max(report.longest, length)
    if length <= limit:
        return example
    if encoding.truncation == "error":
        raise DataError(
            f"{example.where}: {length} tokens are more than the {limit} allowed; raise the limit, or choose a policy: "
            f"{listing(TRUNCATIONS[1:])}"
        )
    if encoding.truncation == "drop":
        report.dropped_long += 1
        return None
    report.cut += 1
    # The special tokens that a vocabulary sets around a text stay: classifiers read them.
    tokens = example.tokens
    around = example.label is not None or example.target is not None
    tail = int(around and tokens[-1] in tokenizer.special_ids)
    head = int(around and tokens[0] in tokenizer.special_ids)
    keep = _kept(len(tokens), limit, head, tail, encoding.truncation)
    label = example.label
    return replace(
        example,
        tokens=[tokens[i] for i in keep],
        scored=[example.scored[i] for i in keep],
        label=[label[i] for i in keep] if isinstance(label, list) else label,
        types=None if example.types is None else [example.types[i] for i in keep],
        # A target is always read from its beginning.
        target=None if example.target is None else example.target[:limit],
    )


def _kept(length: int, limit: int, head: int, tail: int, policy: str) -> list[int]:
    """Places that stay."""
    if length <= limit:
        return list(range(length))
    room = limit - head - tail
    if room < 0:
        return list(range(limit))
    middle = range(head, head + room) if policy == "cut-right" else range(length - tail - room, length - tail)
    return [*range(head), *middle, *range(length - tail, length)]


def _plain(scored: Scored) -> list[Example]:
    return [Example(scored.tokens, scored.scored)]


def _encode_text(row: Row, where: str, tokenizer: Tokenizer, encoding: Encoding) -> list[Example]:
    if encoding.seq2seq:
        raise DataError(f"{where}: an encoder-decoder learns from rows with source and target, not from plain text")
    return _plain(with_end(tokenizer, encode_pieces(tokenizer, [(row["text"], True)], add_special_tokens=True)))


def _encode_completion(row: Row, where: str, tokenizer: Tokenizer, encoding: Encoding) -> list[Example]:
    prompt, completion = row["prompt"], row["completion"]
    if encoding.seq2seq:
        return _pair(prompt, completion, tokenizer)
    if encoding.chat and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _encode_chat({"messages": messages}, where, tokenizer, encoding)
    pieces = [(prompt, encoding.loss_on == "all"), (completion, True)]
    return _plain(with_end(tokenizer, encode_pieces(tokenizer, pieces, add_special_tokens=True)))


def _encode_chat(row: Row, where: str, tokenizer: Tokenizer, encoding: Encoding) -> list[Example]:
    if encoding.seq2seq:
        raise DataError(f"{where}: an encoder-decoder learns from rows with source and target, not from chats")
    if tokenizer.chat_template is None and "chat_template" not in encoding.variables:
        raise DataError(
            f"{where}: the rows are chats, and this model has no chat template, so it was probably not made for chats; "
            "give rows with prompt and completion, take the instruct model of the family, or put a chat_template.jinja "
            "into the model's folder"
        )
    turns = encode_chat_turns(
        tokenizer,
        row["messages"],
        where,
        tools=row.get("tools"),
        loss_on=encoding.loss_on,
        **encoding.variables,
    )
    return [example for scored in turns for example in _plain(scored)]


def _pair(source: str, target: str, tokenizer: Tokenizer) -> list[Example]:
    tokens = tokenizer.encode(source)
    wanted = with_end(tokenizer, Scored(tokenizer.encode(target), []))
    return [Example(tokens, [False] * len(tokens), target=wanted.tokens)]


def _encode_seq2seq(row: Row, where: str, tokenizer: Tokenizer, encoding: Encoding) -> list[Example]:
    if encoding.seq2seq:
        return _pair(row["source"], row["target"], tokenizer)
    return _encode_completion({"prompt": row["source"], "completion": row["target"]}, where, tokenizer, encoding)


def _class(label: str | int, where: str, encoding: Encoding) -> int:
    if str(label) not in encoding.labels:
        raise DataError(f"{where}: unknown label {str(label)!r}{nearest(str(label), encoding.labels)}")
    return encoding.labels.index(str(label))


def _encode_classification(row: Row, where: str, tokenizer: Tokenizer, encoding: Encoding) -> list[Example]:
    label, pair = _class(row["label"], where, encoding), row.get("pair")
    if pair is not None:
        tokens, types = tokenizer.encode_with_types(row["text"], pair)
        return [Example(tokens, [False] * len(tokens), label=label, types=types if encoding.token_types else None)]
    tokens = tokenizer.encode(row["text"])
    return [Example(tokens, [False] * len(tokens), label=label)]


def _encode_tagging(row: Row, where: str, tokenizer: Tokenizer, encoding: Encoding) -> list[Example]:
    """Labels stand on the first token of each word (Devlin et al. 2018, section 5.3)."""
    words, text = row["tokens"], " ".join(row["tokens"])
    probe, whole = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("x")
    at = next((i for i in range(len(whole)) if whole[i : i + len(probe)] == probe), 0)
    before, after = whole[:at], whole[at + len(probe) :]
    plain = tokenizer.encode(text, add_special_tokens=False)
    tokens: list[int] = list(before)
    labels: list[int] = [IGNORE] * len(before)
    for number, (word, label) in enumerate(zip(words, row["labels"], strict=True)):
        ids = tokenizer.encode(word, add_special_tokens=False)
        done = len(tokens) - len(before)
        if number and plain[done : done + len(ids)] != ids:
            ids = tokenizer.encode(f" {word}", add_special_tokens=False)  # vocabularies whose tokens hold spaces
        if not ids:
            raise DataError(f"{where}: the word {word!r} gives no token")
        tokens += ids
        labels += [_class(label, where, encoding), *[IGNORE] * (len(ids) - 1)]
    tokens, labels = tokens + after, labels + [IGNORE] * len(after)
    return [Example(tokens, [False] * len(tokens), label=labels)]


_ENCODERS: dict[str, Callable[[Row, str, Any, Encoding], Sequence[Example]]] = {
    "text": _encode_text,
    "completion": _encode_completion,
    "chat": _encode_chat,
    "seq2seq": _encode_seq2seq,
    "classification": _encode_classification,
    "tagging": _encode_tagging,
}
