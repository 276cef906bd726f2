"""The settings of a training run: one flat, checked record."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mlxlm.errors import ConfigError, UsageError, nearest
from mlxlm.training.schedules import learning_rate_schedule

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
DTYPES = ("float32", "float16", "bfloat16")
FINAL_WEIGHTS = ("last", "best")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train.

    steps: updates of the weights.  accumulation: batches of one update; the gradient is that of all their targets
    together, default 1.
    optimizer: "adamw", "adafactor", "lion", "muon" (AdamW for what is no matrix of a layer) or "sgd".
    betas, eps: of Adam and Lion, by default the optimizer's.  momentum: of SGD and Muon, default 0.9.
    learning_rate: at the peak.  schedule, warmup_steps, decay_steps, final_learning_rate: see
    `learning_rate_schedule`; the last is a share of the peak.
    weight_decay: decoupled, of matrices only, default 0.  clip_norm: of the global gradient norm, None for no clipping.
    label_smoothing, z_loss: of the training loss, given to the task, default 0; evaluation leaves them out.
    ema_decay: keep an exponential moving average of the weights, which is then evaluated and saved; None for none.
    dtype: to compute in, None for the model's.  master_weights: keep what is trained, its gradients and the optimizer's
    state in float32, default True.
    recompute_layers: layers of each stack whose activations are computed again instead of kept; default 0, -1 for all.
    cache_limit: bytes of freed buffers that MLX may keep for reuse while the run lasts, 0 for none; None, the default,
    leaves the limit as it is. Less memory, and slower the lower it is.
    compile: the step, None for yes on a GPU, but not for several over NCCL.  seed: of dropout.
    evaluate_every, save_every, report_every: in steps; 0 for the end alone.  val_batches: of the validation data in an
    evaluation, the same ones each time, default 100, -1 for all.  best_by: by what the best weights are told, "loss"
    (the default, the lowest) or a measure that the task has besides, such as "accuracy" (the highest; of equal ones the
    loss decides).  patience: evaluations without better weights after which to stop, 0 never.
    keep_last: newest checkpoints kept beside the best one.
    final_weights: "last", the default, or "best": a run that ends leaves the weights of its last step in the model, or
    those of the checkpoint that was best on the validation data.
    max_skipped: updates in a row that may be skipped for gradients that aren't finite.
    """

    steps: int
    accumulation: int = 1
    optimizer: str = "adamw"
    betas: tuple[float, float] | None = None
    eps: float = 1e-8
    momentum: float = 0.9
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_learning_rate: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ema_decay: float | None = None
    dtype: str | None = None
    master_weights: bool = True
    recompute_layers: int = 0
    cache_limit: int | None = None
    compile: bool | None = None
    seed: int = 0
    evaluate_every: int = 0
    val_batches: int = 100
    save_every: int = 0
    report_every: int = 10
    best_by: str = "loss"
    patience: int = 0
    keep_last: int = 3
    final_weights: str = "last"
    max_skipped: int = 5

    def __post_init__(self) -> None:
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))  # JSON and YAML have lists
        for name, (holds, expected) in self._demands().items():
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)!r}; expected {expected}")
        choices_of = {"optimizer": OPTIMIZERS, "dtype": (None, *DTYPES), "final_weights": FINAL_WEIGHTS}
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f"unknown {name} {value!r}{nearest(value, [c for c in choices if c])}")
        self.rate(0)

    def _demands(self) -> dict[str, tuple[bool, str]]:
        betas = (0.0, 0.0) if self.betas is None else self.betas
        clip = 1.0 if self.clip_norm is None else self.clip_norm
        cache = 0 if self.cache_limit is None else self.cache_limit
        ema = 0.5 if self.ema_decay is None else self.ema_decay
        return {
            "steps": (self.steps >= 1, "at least 1"),
            "accumulation": (self.accumulation >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "a number above 0"),
            "betas": (len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers from 0 to below 1"),
            "eps": (0 < self.eps < math.inf, "a number above 0"),
            "momentum": (0 <= self.momentum < 1, "a number from 0 to below 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "clip_norm": (clip > 0, "a number above 0, or null"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "a number from 0 to below 1"),
            "z_loss": (0 <= self.z_loss < math.inf, "0 or more"),
            "ema_decay": (0 < ema < 1, "a number between 0 and 1, or null"),
            "recompute_layers": (self.recompute_layers >= -1, "a number of layers, or -1 for all"),
            "cache_limit": (isinstance(cache, int) and cache >= 0, "a number of bytes, or null"),
            "evaluate_every": (self.evaluate_every >= 0, "0 or more"),
            "save_every": (self.save_every >= 0, "0 or more"),
            "report_every": (self.report_every >= 0, "0 or more"),
            "val_batches": (self.val_batches >= 1 or self.val_batches == -1, "a number of batches, or -1 for all"),
            "patience": (self.patience >= 0, "0 or more"),
            "keep_last": (self.keep_last >= 1, "at least 1"),
            "max_skipped": (self.max_skipped >= 0, "0 or more"),
        }

    def rate(self, step: int) -> float:
        """The learning rate of a step, 0 for the first."""
        return learning_rate_schedule(
            self.schedule,
            self.learning_rate,
            self.steps,
            warmup=self.warmup_steps,
            decay=self.decay_steps,
            floor=self.final_learning_rate,
        )(step)

    def to_json(self) -> dict[str, Any]:
        """All settings, defaults included."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainSettings:
        """Settings by name. Raises ConfigError for all unknown names at once, UsageError for values."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [f"unknown setting {name!r}{nearest(name, names)}" for name in values if name not in names]
        if unknown:
            raise ConfigError("; ".join(unknown))
        return cls(**values)
