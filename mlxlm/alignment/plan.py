"""The memory of an alignment run: the training step as for fine-tuning, and what alignment adds to it.

That is the reference, where the weights themselves are trained and those from before are kept; the other answers of a
comparison, each of which is a row; texts that are learned beside; and the moments between updates, when answers are
drawn and scored: caches and logits instead of activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mlxlm.alignment.answering import rows_at_once
from mlxlm.alignment.settings import AlignSettings
from mlxlm.generation.plan import activation_bytes, cache_bytes
from mlxlm.kernels.cross_entropy import default_chunk
from mlxlm.layers import CacheSpec
from mlxlm.models import Transformer
from mlxlm.training import plan as plans
from mlxlm.training.plan_weights import WIDTHS
from mlxlm.training.step import dtype_of

# Of answers and texts that are learned in one update the gradients of the one are mostly made before the activations of
# the other: of these so much exists besides. Measured on the CPU.
_BESIDE = 0.3
_LOGITS = 3  # float32 arrays of the size of a step's logits that exist at once while words are drawn


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of what is learned from.

    length: tokens of the longest row, prompt and answer.  answers: of a comparison, each of which is a row, default 1.
    texts_length: of the longest text that is learned beside (PPO-ptx), default 0 for none.
    """

    length: int
    answers: int = 1
    texts_length: int = 0


@dataclass(frozen=True, kw_only=True)
class AlignmentPlan(plans.MemoryPlan):
    """Bytes by part, see `MemoryPlan`.

    reference: the trained weights as they were before; 0 with adapters.  answering: what drawing or scoring answers
    takes beside the weights, between updates.
    """

    reference: int
    answering: int

    @property
    def lasting(self) -> int:
        """See `MemoryPlan`."""
        return super().lasting + self.reference

    @property
    def peak(self) -> int:
        """The most that exists at once, in an update or between updates."""
        return max(super().peak, self.lasting + self.answering)


def predict(model: Transformer, settings: AlignSettings, sizes: Sizes, processes: int = 1) -> AlignmentPlan:
    """The memory of a run, of each of its processes.

    model: with its adapter and heads, what is frozen frozen.  processes: that share the rows of a batch.
    """
    tuning = settings.tuning
    rows = -(-tuning.batch_size // processes) * sizes.answers
    beside = math.ceil(rows * sizes.texts_length / sizes.length)  # texts, as rows of that length
    dtype = tuning.dtype or str(dtype_of(model)).removeprefix("mlx.core.")
    at_once = max(rows, beside) + math.ceil(_BESIDE * min(rows, beside))
    made = plans.predict(model, plans.PlanSettings(
        batch_size=at_once, length=sizes.length, accumulation=tuning.grad_accumulation_steps, dtype=dtype,
        optimizer=tuning.optimizer, average=tuning.ema_decay is not None,
        recompute_layers=-1 if tuning.grad_checkpoint else tuning.recompute_layers,
    ))  # fmt: skip
    width = WIDTHS[dtype]
    own = sum(array.size for array in model.adapters.originals.values())
    return AlignmentPlan(
        **made.parts(), reference=own * width, answering=_answering_bytes(model, settings, sizes, rows, width)
    )


def _answering_bytes(model: Transformer, settings: AlignSettings, sizes: Sizes, rows: int, width: int) -> int:
    """What drawing answers takes, or what scoring them does, whichever is more."""
    config = model.config
    if not config.predicts_words:
        return 0
    words, tokens = config.head.vocab_size, rows * sizes.length
    chunk = min(default_chunk(tokens, words, trained=False), words)
    scoring = tokens * (activation_bytes(config, size=width) + 4 * chunk)
    if not settings.reward and not settings.answers:
        return scoring
    drawn = rows_at_once(settings)
    length = sizes.length + (0 if settings.from_rollouts else settings.max_tokens or 0)
    drawing = drawn * (cache_bytes(config, length, spec=CacheSpec(), size=width) + _LOGITS * 4 * words)
    return max(scoring, drawing)


def planned(
    settings: AlignSettings, model: Transformer, sizes: Sizes, processes: int = 1
) -> tuple[AlignSettings, AlignmentPlan]:
    """The settings as their `memory` says, and the plan. Raises MemoryPlanError for a run that can't fit."""
    tuning = settings.tuning
    if tuning.memory == "low":
        settings = _with(settings, batch_size=1, recompute_layers=-1)
        settings = replace(settings, tuning=replace(settings.tuning, cache_limit=0))
    plan = predict(model, settings, sizes, processes)
    if tuning.memory not in ("check", "auto") or plan.peak <= (limit := plans.working_set()):
        return settings, plan
    better = _fitting(settings, model, sizes, processes, limit)
    if better is not None and tuning.memory == "auto":
        return better, predict(model, better, sizes, processes)
    said = f"alignment needs {plans.readable(plan.peak)}, but {plans.readable(limit)} may be used"
    if better is None:
        raise plans.MemoryPlanError(
            f"{said}, and more than that even with one comparison or answer at a time and all layers recomputed: "
            "lower --max-seq-length or --max-tokens, train fewer weights (--fine-tune-type lora) or use a smaller model"
        )
    chosen = better.tuning
    raise plans.MemoryPlanError(
        f"{said}; --batch-size {chosen.batch_size} --grad-accumulation-steps {chosen.grad_accumulation_steps} "
        f"--recompute-layers {chosen.recompute_layers} would fit"
    )


def _fitting(
    settings: AlignSettings, model: Transformer, sizes: Sizes, processes: int, limit: int
) -> AlignSettings | None:
    """The fastest settings that learn from as many comparisons or answers an update and fit; None where none do."""
    most = settings.tuning.batch_size
    for batch in sorted({max(processes, most >> shift) for shift in range(most.bit_length())}, reverse=True):
        for recompute in (settings.tuning.recompute_layers, -1):
            candidate = _with(settings, batch_size=batch, recompute_layers=recompute)
            if predict(model, candidate, sizes, processes).peak <= limit:
                return candidate
    return None


def _with(settings: AlignSettings, *, batch_size: int, recompute_layers: int) -> AlignSettings:
    """The settings with other passes, of as many rows an update."""
    tuning = settings.tuning
    times = math.ceil(tuning.batch_size * tuning.grad_accumulation_steps / batch_size)
    return replace(settings, tuning=replace(
        tuning, batch_size=batch_size, grad_accumulation_steps=times, grad_checkpoint=False,
        recompute_layers=recompute_layers,
    ))  # fmt: skip
