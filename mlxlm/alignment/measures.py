"""How well a model tells good answers from bad ones: loss, accuracy, margins, calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxlm.alignment.preferences import calibration_error
from mlxlm.alignment.tasks import AnswerTask
from mlxlm.errors import DataError
from mlxlm.training import Evaluation
from mlxlm.training.finetune.answers import untouched_chance

if TYPE_CHECKING:
    from mlxlm.alignment.comparisons import ComparisonSource
    from mlxlm.models import Transformer

_EQUAL = 1e-5  # rewards that differ by less are equal: log probabilities of the same model differ by rounding


def measure_comparisons(
    model: Transformer, task: AnswerTask, source: ComparisonSource
) -> tuple[Evaluation, dict[str, float]]:
    """The mean loss over a source's comparisons, and how their answers' rewards compare.

    Of pairs: accuracy, the share whose better answer has the larger reward (one half for equal ones); margin, the mean
    difference; calibration_error, of sigmoid(difference) as the probability that the first one is the better.
    Of single answers: accuracy, the chance that a good one has a larger reward than a bad one (the area under the ROC
    curve); reward_good and reward_bad, the means.
    """
    total, count = 0.0, 0
    differences: list[np.ndarray] = []
    good: list[np.ndarray] = []
    bad: list[np.ndarray] = []
    with untouched_chance(model):
        while (batch := source.next()) is not None:
            loss, number, rewards = task.read(model, {name: mx.array(array) for name, array in batch.items()})
            found = np.array(rewards, dtype=np.float64)
            total, count = total + loss.item(), count + number.item()
            if "better" in batch:
                differences.append(found[batch["better"]] - found[batch["worse"]])
            else:
                good.append(found[batch["desirable"]])
                bad.append(found[~batch["desirable"]])
    if not count:
        raise DataError("there are no comparisons to measure")
    made = Evaluation(total / count, count)
    if differences:
        return made, of_differences(np.concatenate(differences))
    return made, of_rewards(np.concatenate(good), np.concatenate(bad))


def of_differences(differences: np.ndarray) -> dict[str, float]:
    """Measures of pairs, see `measure_comparisons`, from the differences of their rewards (P,)."""
    right = np.where(np.abs(differences) < _EQUAL, 0.5, differences > 0)
    confident = 1 / (1 + np.exp(-np.clip(np.abs(differences), 0, 700)))
    return {
        "accuracy": float(right.mean()),
        "margin": float(differences.mean()),
        "calibration_error": calibration_error(confident, right),
    }


def of_rewards(good: np.ndarray, bad: np.ndarray) -> dict[str, float]:
    """Measures of single answers, see `measure_comparisons`."""
    found = {f"reward_{name}": float(one.mean()) for name, one in (("good", good), ("bad", bad)) if len(one)}
    if len(good) and len(bad):
        apart = good[:, None] - bad[None]
        found = {"accuracy": float(np.where(np.abs(apart) < _EQUAL, 0.5, apart > 0).mean()), **found}
    return found
