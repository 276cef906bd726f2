"""Loss and perplexity over a whole set of validation data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxlm.errors import DataError
from mlxlm.training.step import Step


@dataclass(frozen=True)
class Evaluation:
    """loss: mean over all targets of the set, natural logarithm.  count: of targets.  perplexity: exp(loss)."""

    loss: float
    count: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is too large a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class EvaluationStopped(Exception):
    """An evaluation was left before its end, because the run is asked to stop."""


def evaluate(step: Step, source: Any, stopped: Callable[[], bool] = lambda: False) -> Evaluation:
    """Loss over all batches of a source, the last partial one included, every target weighing the same.

    stopped: asked before each batch whether to leave.  Raises DataError when there is no target, EvaluationStopped.
    """
    total, count = 0.0, 0
    while (batch := source.next()) is not None:
        if stopped():
            raise EvaluationStopped
        loss, targets = step.evaluate(batch)
        total, count = total + loss, count + targets
    if count == 0:
        raise DataError("the validation data has no targets, so there is no loss to measure")
    return Evaluation(total / count, count)
