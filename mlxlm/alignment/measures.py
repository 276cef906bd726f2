"""How well a model tells good answers from bad ones: loss, accuracy, margins, calibration."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxlm.alignment.preferences import calibration_error
from mlxlm.alignment.spreading import gathered
from mlxlm.alignment.tasks import AnswerTask
from mlxlm.errors import DataError
from mlxlm.training import Evaluation
from mlxlm.training.finetune.answers import untouched_chance

if TYPE_CHECKING:
    from mlxlm.alignment.comparisons import ComparisonSource
    from mlxlm.distributed import Joined
    from mlxlm.models import Transformer

_PAUSE = 10.0  # seconds between words on progress
_EQUAL = 1e-5  # rewards that differ by less are equal: log probabilities of the same model differ by rounding


def measure_comparisons(
    model: Transformer,
    task: AnswerTask,
    source: ComparisonSource,
    joined: Joined,
    told: Callable[[int], None] = lambda done: None,
) -> tuple[Evaluation, dict[str, float]]:
    """The mean loss over a source's comparisons, and how their answers' rewards compare.

    source: of this process's share of them.  told: is given how many of the share are done.

    Of pairs: accuracy, the share whose better answer has the larger reward (one half for equal ones); margin, the mean
    difference; calibration_error, of sigmoid(difference) as the probability that the first one is the better.
    Of single answers: accuracy, the chance that a good one has a larger reward than a bad one (the area under the ROC
    curve); reward_good and reward_bad, the means.
    """
    losses: list[tuple[float, int]] = []
    found: dict[str, list[float]] = {"differences": [], "good": [], "bad": []}
    done = 0
    with untouched_chance(model):
        while (batch := source.next()) is not None:
            loss, number, rewards = task.read(model, {name: mx.array(array) for name, array in batch.items()})
            losses.append((loss.item(), number.item()))
            values, counted = np.array(rewards, dtype=np.float64), batch["comparisons"] > 0
            if "better" in batch:
                mine = batch["pair_weights"] > 0
                found["differences"] += (values[batch["better"]] - values[batch["worse"]])[mine].tolist()
            else:
                found["good"] += values[batch["desirable"] & counted].tolist()
                found["bad"] += values[~batch["desirable"] & counted].tolist()
            done += int(counted.sum())
            told(done)
    parts = gathered(joined, [{"losses": losses, **found}], "measures of comparisons")
    total, count = np.sum([pair for part in parts for pair in part["losses"]], axis=0).tolist()
    if not count:
        raise DataError("there are no comparisons to measure")
    differences, good, bad = (np.array([x for part in parts for x in part[name]]) for name in found)
    measures = of_differences(differences) if len(differences) else of_rewards(good, bad)
    return Evaluation(total / count, int(count)), measures


def paced(say: Callable[[str], None], what: str, count: int) -> Callable[[int], None]:
    """A function that is given how many of so many things are done, and says so every ten seconds."""
    last = time.monotonic()

    def told(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PAUSE and done < count:
            last = time.monotonic()
            say(f"{what}: {done} of {count}")

    return told


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
