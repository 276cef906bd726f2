"""Learning rates by step: a linear warmup, then one of five shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

from mlxlm.errors import UsageError, nearest

# A shape gives the share of the peak, from the step after warmup and the number of such steps.
Shape = Callable[[float, "Plan"], float]


class Plan:
    """Numbers that a schedule is made of.

    steps: all steps of the run.  warmup: the first of them, in which the rate rises in a line to its peak.
    decay: last steps of "wsd", in which it falls.  floor: share of the peak at the end.
    """

    def __init__(self, steps: int, warmup: int, decay: int, floor: float):
        if not 0 <= warmup <= steps:
            raise UsageError(f"warmup_steps is {warmup}; expected 0 to {steps}, the steps of the run")
        if not 0 <= decay <= steps - warmup:
            raise UsageError(f"decay_steps is {decay}; expected 0 to {steps - warmup}, the steps after warmup")
        if not 0.0 <= floor <= 1.0:
            raise UsageError(f"final_learning_rate is {floor} of the peak; expected 0 to 1")
        self.steps, self.warmup, self.decay, self.floor = steps, warmup, decay, floor

    @property
    def after_warmup(self) -> int:
        """Steps after the warmup, at least 1."""
        return max(self.steps - self.warmup, 1)


def _constant(step: float, plan: Plan) -> float:
    return 1.0


def _linear(step: float, plan: Plan) -> float:
    return 1.0 - (1.0 - plan.floor) * step / plan.after_warmup


def _cosine(step: float, plan: Plan) -> float:
    return plan.floor + (1.0 - plan.floor) * 0.5 * (1.0 + math.cos(math.pi * step / plan.after_warmup))


def _inverse_square_root(step: float, plan: Plan) -> float:
    start = max(plan.warmup, 1)
    return max(math.sqrt(start / (start + step)), plan.floor)


def _warmup_stable_decay(step: float, plan: Plan) -> float:
    left = plan.after_warmup - step
    if plan.decay == 0 or left >= plan.decay:
        return 1.0
    return plan.floor + (1.0 - plan.floor) * left / plan.decay


SCHEDULES: dict[str, Shape] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse-sqrt": _inverse_square_root,
    "wsd": _warmup_stable_decay,
}


def learning_rate_schedule(
    name: str, peak: float, steps: int, *, warmup: int = 0, decay: int = 0, floor: float = 0.0
) -> Callable[[int], float]:
    """The learning rate of a step, 0 for the first: a function of the step's number alone.

    name: of the shape after the warmup, with s steps since then and n in all after it:
    "constant": peak.  "linear": from peak to floor * peak.  "cosine": floor + (1 - floor) * (1 + cos(pi * s / n)) / 2
    of the peak (Loshchilov and Hutter 2017, arXiv:1608.03983).  "inverse-sqrt": sqrt(w / (w + s)) of the peak, with w
    the warmup's steps (Vaswani et al. 2017, arXiv:1706.03762), not below floor.  "wsd": the peak, then in the last
    `decay` steps a line down to floor (Hu et al. 2024, arXiv:2404.06395).
    peak: after the warmup, in which step i has peak * (i + 1) / warmup.  floor: share of the peak, default 0.

    Raises UsageError for an unknown name or numbers that don't fit together.
    """
    if name not in SCHEDULES:
        raise UsageError(f"unknown schedule {name!r}{nearest(name, SCHEDULES)}")
    plan, shape = Plan(steps, warmup, decay, floor), SCHEDULES[name]

    def rate(step: int) -> float:
        if step < plan.warmup:
            return peak * (step + 1) / plan.warmup
        return peak * shape(min(step - plan.warmup, plan.after_warmup), plan)

    return rate
