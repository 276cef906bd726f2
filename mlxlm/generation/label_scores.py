"""How well predicted labels agree with the right ones: accuracy, F1 by class and its mean, F1 of tagged entities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlxlm.errors import UsageError

_TAG = re.compile(r"([BIES])-(.+)")


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """Of one class: precision, recall and F1, 0 where nothing is predicted or right, and its number of right labels."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """accuracy: share of right labels.  balanced_accuracy: mean recall over the classes that occur.
    macro_f1: mean F1 over the classes that occur or are predicted, so that a rare class counts as much as a common one.
    entity_f1: of whole entities, where the labels are B-, I- and O tags, else None.  classes: by name.  count: labels.
    """

    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    count: int
    entity_f1: float | None = None
    classes: dict[str, ClassScores] = field(default_factory=dict)

    def to_json(self) -> dict[str, float]:
        """The numbers that a report shows, by name."""
        values = {"accuracy": self.accuracy, "balanced_accuracy": self.balanced_accuracy, "macro_f1": self.macro_f1}
        return values if self.entity_f1 is None else {**values, "entity_f1": self.entity_f1}


def score_labels(
    right: Sequence[str] | Sequence[Sequence[str]], given: Sequence[str] | Sequence[Sequence[str]]
) -> LabelScores:
    """Scores of labels, one a text, or a list a sentence.  right, given: names, in the same order.

    Raises UsageError where there is none, or not as many of one as of the other.
    """
    sentences = bool(right) and not isinstance(right[0], str)
    if len(right) != len(given) or (sentences and any(len(a) != len(b) for a, b in zip(right, given, strict=True))):
        raise UsageError("there must be as many given labels as right ones")
    flat = [label for row in right for label in row] if sentences else list(right)
    mine = [label for row in given for label in row] if sentences else list(given)
    if not flat:
        raise UsageError("there are no labels to score")
    names = sorted({*flat, *mine})
    number = {name: index for index, name in enumerate(names)}
    table = np.zeros((len(names), len(names)), dtype=np.int64)  # right by given
    np.add.at(table, ([number[label] for label in flat], [number[label] for label in mine]), 1)
    hits, support, predicted = np.diag(table), table.sum(1), table.sum(0)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    classes = {
        name: ClassScores(
            precision=float(precision[i]), recall=float(recall[i]), f1=float(f1[i]), support=int(support[i])
        )
        for i, name in enumerate(names)
    }
    tags = sentences and any(_TAG.fullmatch(name) for name in names)
    return LabelScores(
        accuracy=float(hits.sum() / table.sum()),
        balanced_accuracy=float(recall[support > 0].mean()),
        macro_f1=float(f1.mean()),
        count=len(flat),
        entity_f1=_entity_f1(right, given) if tags else None,  # type: ignore[arg-type]
        classes=classes,
    )


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first, last word + 1) of each entity in B-, I-, E-, S- and O tags; an I- that follows no entity of its
    kind begins one (Tjong Kim Sang and De Meulder 2003, CoNLL-2003's scorer).
    """
    found, kind, start, mark = set(), None, 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        match = _TAG.fullmatch(tag)
        new_mark, new_kind = (match[1], match[2]) if match else ("O", None)
        if kind is not None and (new_kind != kind or new_mark in "BS" or mark in "ES"):
            found.add((kind, start, place))
            kind = None
        if new_kind is not None and kind is None:
            kind, start = new_kind, place
        mark = new_mark
    return found


def _entity_f1(right: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> float:
    hits = wanted = predicted = 0
    for one, other in zip(right, given, strict=True):
        mine, theirs = entities(one), entities(other)
        hits, wanted, predicted = hits + len(mine & theirs), wanted + len(mine), predicted + len(theirs)
    return 2 * hits / max(wanted + predicted, 1)
