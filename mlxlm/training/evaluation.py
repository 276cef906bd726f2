"""Loss and perplexity over validation data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxlm.errors import DataError
from mlxlm.training.step import Step


@dataclass(frozen=True)
class Evaluation:
    """loss: mean over all targets gone through, natural logarithm.  count: of targets.  perplexity: exp(loss)."""

    loss: float
    count: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is too large a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class EvaluationStopped(Exception):
    """An evaluation was left before its end, because the run is asked to stop."""


def evaluate(
    step: Step,
    source: Any,
    stopped: Callable[[], bool] = lambda: False,
    *,
    most: int | None = None,
    told: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Loss over the batches of a source, the last partial one included, every target weighing the same.

    stopped: asked before each batch whether to leave.  most: batches to go through, None for all.  told: is told after
    each batch how many are done.  Raises DataError when there is no target, EvaluationStopped.
    """
    total, count, done = 0.0, 0, 0
    while (most is None or done < most) and (batch := source.next()) is not None:
        if stopped():
            raise EvaluationStopped
        loss, targets = step.evaluate(batch)
        total, count, done = total + loss, count + targets, done + 1
        told(done)
    if count == 0:
        raise DataError("the validation data has no targets, so there is no loss to measure")
    return Evaluation(total / count, count)
