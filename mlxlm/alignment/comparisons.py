"""What people think of answers, as examples: pairs, rankings and single answers that are good or bad; and their
batches.

Rows: {"prompt", "chosen", "rejected"} (with "margin", a number, if wanted), {"prompt", "ranked"} with at least two
answers, best first, and {"prompt", "completion", "label"} with true for a good answer and false for a bad one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxlm.alignment.log_probabilities import with_places
from mlxlm.alignment.preferences import ranked_pairs
from mlxlm.data import Batch, Encoding, Example, Report, Rows, SupervisedSource, encode_rows, pad_examples
from mlxlm.errors import DataError

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer


@dataclass(frozen=True)
class Comparison(Example):
    """Answers to one prompt and which of them are better; its tokens are those of all answers together.

    answers: prompt and answer each.  pairs: (better, worse) of them.  margins: of the pairs.  desirable: of a single
    answer, whether it is good; answers[1] is then one that belongs to another prompt.  reference: log probability of
    each answer by the reference, () before it is known.
    """

    answers: tuple[Example, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    margins: tuple[float, ...] = ()
    desirable: bool | None = None
    reference: tuple[float, ...] = ()


@dataclass(frozen=True)
class Lost:
    """What became of rows.  report: of their answers.  same: rows of which two answers have the same tokens."""

    report: Report
    same: int

    def __str__(self) -> str:
        same = f", {self.same} rows left out, as answers of theirs are the same" if self.same else ""
        return f"{self.report}{same}"


def comparisons(
    rows: Rows, tokenizer: Tokenizer, encoding: Encoding, *, rewards: bool
) -> tuple[list[Comparison], Lost]:
    """The comparisons of rows, and what became of their answers. A row that lost one of them is left out, and so is one
    of which two answers are the same, as they are or after they were cut: one can't be better than itself.

    rewards: the answers are for a model that gives a reward to each as a whole.
    Raises DataError for rows of another format.
    """
    found, report = encode_rows(_completions(rows), tokenizer, encoding)
    by_row: dict[str, list[Example]] = {}
    for example in found:
        # A reward stands at the last token, and everything before it is read.
        example = replace(example, scored=[False] * len(example.tokens), label=0) if rewards else example
        by_row.setdefault(example.where.rpartition(", answer ")[0], []).append(example)
    made, same = [], 0
    for where, row in rows.rows:
        answers, count = by_row.get(where, []), len(_answers(rows.format, row))
        if len(answers) != count:
            continue
        if rows.format == "completion":
            made.append(_joined(answers, where, desirable=row["label"]))
            continue
        if len({tuple(answer.tokens) for answer in answers}) < count:
            same += 1
            continue
        pairs = ranked_pairs(range(count, 0, -1))
        margin = row.get("margin", 0.0)
        made.append(_joined(answers, where, pairs=tuple(pairs), margins=(float(margin),) * len(pairs)))
    lost = Lost(report, same)
    if not made:
        raise DataError(f"{rows.name}: no row has all of its answers left ({lost})")
    return (_with_others(made) if rows.format == "completion" else made), lost


def _answers(form: str, row: dict) -> list[str]:
    """The answers of a row, best first."""
    if form == "preference":
        return [row["chosen"], row["rejected"]]
    return list(row["ranked"]) if form == "ranking" else [row["completion"]]


def _completions(rows: Rows) -> Rows:
    """One row a answer, as for fine-tuning; its place tells which."""
    if rows.format not in ("preference", "ranking", "completion"):
        raise DataError(
            f"{rows.name}: rows of format {rows.format!r} compare no answers; expected prompt with chosen and "
            "rejected, with ranked, or with completion and label"
        )
    made = []
    for where, row in rows.rows:
        if rows.format == "completion" and not isinstance(row.get("label"), bool):
            raise DataError(f"{where}: 'label' must say whether the completion is good, true or false")
        margin = row.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, (int, float)):
            raise DataError(f"{where}: 'margin' must be a number, not {margin!r}")
        for number, answer in enumerate(_answers(rows.format, row), 1):
            made.append((f"{where}, answer {number}", {"prompt": row["prompt"], "completion": answer}))
    return Rows(rows.name, "completion", made)


def _joined(answers: Sequence[Example], where: str, **known: object) -> Comparison:
    tokens = [token for answer in answers for token in answer.tokens]
    scored = [mark for answer in answers for mark in answer.scored]
    return Comparison(tokens, scored, where=where, answers=tuple(answers), **known)  # type: ignore[arg-type]


def _with_others(single: list[Comparison]) -> list[Comparison]:
    """Each beside its prompt with the next row's answer, for the divergence of KTO (arXiv:2402.01306, section 4.1)."""
    if len(single) < 2:
        raise DataError("kto needs at least two rows: each is compared with an answer that belongs to another prompt")
    made = []
    for number, one in enumerate(single):
        mine, other = one.answers[0], single[(number + 1) % len(single)].answers[0]
        start, begin = mine.scored.index(True), other.scored.index(True)
        answer = other.tokens[begin:]
        mismatched = Example(mine.tokens[:start] + answer, [False] * start + [True] * len(answer))
        made.append(_joined([mine, mismatched], one.where, desirable=one.desirable))
    return made


def with_reference(given: Sequence[Comparison], values: Sequence[float]) -> list[Comparison]:
    """Comparisons with the reference's log probabilities of all of their answers, in order."""
    numbers = iter(values)
    return [replace(one, reference=tuple(float(next(numbers)) for _ in one.answers)) for one in given]


class ComparisonSource(SupervisedSource):
    """Batches of comparisons: the answers of all (N) with arrays that say how they compare.

    better, worse (P,): numbers of answers.  margins, pair_weights (P,): each comparison's pairs weigh 1 together.
    comparisons (B,): ones.  desirable (B,), with single answers; these come first, then those of other prompts.
    reference (N,), where it is known.

    share: (index, size): every size-th comparison of each batch, from the index on. A process without one in a batch
    has another's that counts for nothing: comparisons and pair_weights are 0.
    """

    def __init__(
        self, examples: Sequence[Comparison], batch_size: int, *, share: tuple[int, int] = (0, 1), **options: Any
    ):
        super().__init__(examples, batch_size, **options)
        self.share = share

    def batch(self, examples: Sequence[Example]) -> Batch:
        """See the class."""
        index, size = self.share
        mine: Sequence[Comparison] = examples[index::size]  # type: ignore[assignment]
        if mine:
            return comparison_batch(mine, self.max_length, self.multiple)
        batch = comparison_batch(examples[-1:], self.max_length, self.multiple)  # type: ignore[arg-type]
        nothing = {name: np.zeros_like(batch[name]) for name in ("comparisons", "pair_weights") if name in batch}
        return {**batch, **nothing}


def comparison_batch(given: Sequence[Comparison], max_length: int, multiple: int = 32) -> Batch:
    """One batch of comparisons, see `ComparisonSource`."""
    single = given[0].desirable is not None
    order = [(i, k) for i, one in enumerate(given) for k in range(len(one.answers))]
    if single:
        order.sort(key=lambda place: place[1])
    number = {place: n for n, place in enumerate(order)}
    batch = pad_examples([given[i].answers[k] for i, k in order], max_length, multiple)
    batch.pop("labels", None)
    batch = with_places(batch) if "targets" in batch else batch
    batch["comparisons"] = np.ones(len(given), dtype=np.int32)
    if given[0].reference:
        batch["reference"] = np.array([given[i].reference[k] for i, k in order], dtype=np.float32)
    if single:
        return {**batch, "desirable": np.array([one.desirable for one in given])}
    pairs = [
        (i, *pair, margin) for i, one in enumerate(given) for pair, margin in zip(one.pairs, one.margins, strict=True)
    ]
    return {
        **batch,
        "better": np.array([number[i, k] for i, k, _, _ in pairs], dtype=np.int32),
        "worse": np.array([number[i, k] for i, _, k, _ in pairs], dtype=np.int32),
        "margins": np.array([margin for *_, margin in pairs], dtype=np.float32),
        "pair_weights": np.array([1 / len(given[i].pairs) for i, *_ in pairs], dtype=np.float32),
    }
