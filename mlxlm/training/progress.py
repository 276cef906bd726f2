"""Where a run is, how fast it goes, and how it ended."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where a run is; goes into checkpoints.

    step: updates done, skipped ones included.  tokens: read so far.  targets: learned so far.  skipped, in_a_row:
    updates left out, in all and just now.  loss, count, interval_tokens: sums since the last report.
    best, best_measure, best_step: loss on the validation data, and the measure by which they are chosen, of the best
    weights so far; the lowest loss where none is named.  stale: evaluations since then.
    """

    step: int = 0
    tokens: int = 0
    targets: int = 0
    skipped: int = 0
    in_a_row: int = 0
    loss: float = 0.0
    count: int = 0
    interval_tokens: int = 0
    best: float | None = None
    best_measure: float | None = None
    best_step: int | None = None
    stale: int = 0
    evaluated: int = -1
    norm: float = 0.0


@dataclass(frozen=True)
class Result:
    """How a run ended.

    step: updates done.  reason: "done", "data" (the data ended), "early" (no better loss for a while), "until" (the
    step that was asked for), or the name of a signal.  loss: mean over the last interval that was reported.
    best, best_step: on the validation data, None without.  tokens: read in all.  shapes: of batches that were seen,
    as many as the step was compiled for.
    """

    step: int
    reason: str
    loss: float | None
    best: float | None
    best_step: int | None
    tokens: int
    skipped: int
    shapes: int

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run before its time."""
        return self.reason.startswith("SIG")


@dataclass
class Clock:
    """Time and tokens of this process since the last report; what was done before a run was resumed is not in it."""

    since: float = field(default_factory=time.perf_counter)
    paused: float = 0.0
    tokens: int = 0

    def lap(self) -> float:
        """Tokens per second of training since the last lap, evaluation and saving left out; NaN without a step."""
        now = time.perf_counter()
        speed = self.tokens / max(now - self.since - self.paused, 1e-9) if self.tokens else math.nan
        self.since, self.paused, self.tokens = now, 0.0, 0
        return speed
