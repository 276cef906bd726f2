"""The memory plan: what a training step will take, in bytes by part, before anything is loaded.

Computed from shapes alone. Two moments of a step may be the largest: the start of the backward pass, when all
activations are alive, and the update, when all gradients are and the optimizer works on the largest weights. The plan
is the larger of both.

    settings = fit(model, PlanSettings(batch_size=8, length=2048), limit)      # or check(...), which refuses
    with held_to(predict(model, settings)):
        trainer.run()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import mlx.core as mx

from mlxlm import runtime
from mlxlm.errors import MlxlmError, UsageError, nearest
from mlxlm.kernels.cross_entropy import default_chunk
from mlxlm.models import Transformer, TransformerConfig
from mlxlm.training.packing import JOINED
from mlxlm.training.plan_activations import Activations, activations_of
from mlxlm.training.plan_weights import STATES, WIDTHS, Weights, weights_of

Model = Transformer | TransformerConfig


class MemoryPlanError(MlxlmError):
    """A run can't fit the memory; the text says which settings would."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What a plan depends on besides the model.

    batch_size: rows of one pass.  accumulation: passes of one update, default 1.  length: tokens of a row.
    target_length: tokens of a decoder behind an encoder, default as many.
    dtype: to compute in.  master_weights: trained weights and the optimizer's state in float32.  optimizer: its name.
    average: whether a moving average of the weights is kept.
    recompute_layers: layers of each stack that are computed again, -1 for all.  chunk: words of the loss at once, None
    for the kernel's choice.  targets: share of the tokens that are predicted, default 1.
    """

    batch_size: int
    length: int
    accumulation: int = 1
    target_length: int | None = None
    dtype: str = "float32"
    master_weights: bool = True
    optimizer: str = "adamw"
    average: bool = False
    recompute_layers: int = 0
    chunk: int | None = None
    targets: float = 1.0

    def __post_init__(self) -> None:
        if self.dtype not in WIDTHS:
            raise UsageError(f"unknown dtype {self.dtype!r}{nearest(self.dtype, WIDTHS)}")
        if self.optimizer not in STATES:
            raise UsageError(f"unknown optimizer {self.optimizer!r}{nearest(self.optimizer, STATES)}")
        if min(self.batch_size, self.length, self.accumulation) < 1:
            raise UsageError("batch size, length and accumulation are at least 1")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of a training step by part.

    weights: in the dtype of the computation.  master_weights: their float32 copies.  average: of the trained weights.
    optimizer: its state.  gradients: of what is trained.  summed: gradients of the passes before this one.
    update: what the gradient's norm and the optimizer work with.
    activations: kept for the gradients.  backward: what the backward pass of a block works with, the block itself
    where it is computed again.  loss: of a chunk of the logits, and the hidden states' gradients.
    """

    weights: int
    master_weights: int
    average: int
    optimizer: int
    gradients: int
    summed: int
    update: int
    activations: int
    backward: int
    loss: int

    @property
    def lasting(self) -> int:
        """What exists for the whole of a step."""
        return self.weights + self.master_weights + self.average + self.optimizer

    @property
    def peak(self) -> int:
        """The most that exists at once."""
        first = self.activations + max(self.loss, self.backward)  # of the last block, when nothing is free yet
        return self.lasting + self.summed + max(first, self.gradients + max(self.backward, self.update))

    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def predict(model: Model, settings: PlanSettings) -> MemoryPlan:
    """The memory of a training step.

    model: as it will be trained, so with its adapters and with what is frozen frozen; or a configuration, of which all
    is trained.
    """
    return _predict(_config(model), settings, weights_of(model))


def _config(model: Model) -> TransformerConfig:
    return model if isinstance(model, TransformerConfig) else model.config


def _predict(config: TransformerConfig, settings: PlanSettings, weights: Weights) -> MemoryPlan:
    width, trained = WIDTHS[settings.dtype], weights.trained
    kept = 4 if settings.master_weights else width
    mine = activations_of(config, settings, weights)
    several = settings.accumulation > 1
    return MemoryPlan(
        weights=(weights.floats + trained) * width + weights.packed,
        master_weights=trained * kept if kept != width else 0,
        average=4 * trained if settings.average else 0,
        optimizer=weights.states(settings.optimizer) * kept,
        gradients=trained * (kept if several else width),
        summed=trained * kept if several else 0,
        # The norm of the gradient, from a float32 copy of the small arrays and their squares; then the largest array's.
        update=max(2 * 4 * weights.joined(JOINED), (STATES[settings.optimizer] + 1) * kept * weights.largest),
        activations=mine.kept,
        backward=mine.backward,
        loss=loss_bytes(config, settings, weights, width, mine),
    )


def loss_bytes(
    config: TransformerConfig, settings: PlanSettings, weights: Weights, width: int, mine: Activations
) -> int:
    """Bytes of a chunk of the logits and its gradient, of the hidden states' gradients and of the head's own."""
    if not config.predicts_words:
        return 0
    tokens = max(1, int(settings.batch_size * mine.target_length * settings.targets))
    words = config.head.vocab_size
    learns = weights.feeds_product("embeddings.token" if config.head.tied else "head.output")
    chunk = min(settings.chunk or default_chunk(tokens, words, trained=learns), words)
    head = config.head.dim * words * width
    gradient = 2 * head if learns else 0  # its chunks, then all of them joined
    return 2 * 4 * tokens * chunk + 2 * 4 * tokens * config.dim + gradient


def working_set() -> int:
    """Bytes that a run may take on this machine: what the device recommends, else 75% of the memory.

    Raises MemoryPlanError where the machine says neither.
    """
    memory = runtime.memory()
    if memory.working_set:
        return memory.working_set
    if memory.total:
        return int(0.75 * memory.total)
    raise MemoryPlanError("this machine does not say how much memory it has; give a limit")


def fit(model: Model, settings: PlanSettings, limit: int | None = None) -> PlanSettings:
    """The fastest settings with the same rows in an update that fit `limit` bytes, default the machine's working set.

    Keeps the largest passes it can, computing layers again before it makes passes smaller: a layer computed again costs
    a third more time, and smaller passes cost it on every layer. Then it halves the chunk of the loss.
    Raises MemoryPlanError, with the longest rows that would fit, when not even one row at a time does.
    """
    limit = working_set() if limit is None else limit
    config, weights = _config(model), weights_of(model)
    rows = settings.batch_size * settings.accumulation
    depth = max(len(stack.layers) for stack in (config.encoder, config.decoder) if stack is not None)
    passes = [batch for batch in range(settings.batch_size, 0, -1) if rows % batch == 0]
    for batch in passes:
        for chunk in _chunk_choices(config, settings):
            for count in sorted({0, depth // 2, depth}):
                candidate = replace(
                    settings, batch_size=batch, accumulation=rows // batch, recompute_layers=count, chunk=chunk
                )
                if _predict(config, candidate, weights).peak <= limit:
                    return candidate
    least = replace(settings, batch_size=1, accumulation=rows, recompute_layers=depth)
    raise MemoryPlanError(_refusal(config, least, limit, weights))


def _chunk_choices(config: TransformerConfig, settings: PlanSettings) -> list[int | None]:
    if settings.chunk is not None or not config.predicts_words:
        return [settings.chunk]
    words = config.head.vocab_size
    return [None, *(chunk for chunk in (4096, 1024) if chunk < words)]


def _refusal(config: TransformerConfig, least: PlanSettings, limit: int, weights: Weights) -> str:
    need = _predict(config, least, weights)
    said = f"a step needs {readable(need.peak)} even with one row at a time and all layers recomputed, but"
    said += f" {readable(limit)} may be used"
    length = least.length
    while length > 16:
        length //= 2
        if _predict(config, replace(least, length=length), weights).peak <= limit:
            return f"{said}; rows of {length} tokens (--max-seq-length {length}) would fit"
    return (
        f"{said}; its weights, gradients and optimizer alone take {readable(need.lasting + need.gradients)}: train "
        "fewer of them (--method lora) or use a smaller model"
    )


def check(model: Model, settings: PlanSettings, limit: int | None = None) -> MemoryPlan:
    """The plan of a run that fits. Raises MemoryPlanError with the settings that would, when this one does not."""
    limit = working_set() if limit is None else limit
    plan = predict(model, settings)
    if plan.peak <= limit:
        return plan
    better = fit(model, settings, limit)
    raise MemoryPlanError(
        f"a step needs {readable(plan.peak)}, but {readable(limit)} may be used; --batch-size {better.batch_size} "
        f"--grad-accumulation-steps {better.accumulation} --recompute-layers {better.recompute_layers}"
        + (f" --loss-chunk {better.chunk}" if better.chunk else "")
        + " would fit"
    )


def largest(model: Model, settings: PlanSettings, name: str, limit: int, most: int = 2**20) -> int:
    """The largest value of the setting `name`, "batch_size" or "length", that fits; 0 when none does."""
    config, weights = _config(model), weights_of(model)

    def fits(value: int) -> bool:
        return _predict(config, replace(settings, **{name: value}), weights).peak <= limit

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@contextlib.contextmanager
def held_to(plan: MemoryPlan, limit: int | None = None) -> Iterator[dict[str, int]]:
    """Hold this process to a plan for a while, then put MLX's limits back; gives what was set, in bytes by name.

    memory: above it MLX waits for running work instead of running ahead. It is the plan's peak and a quarter, as plans
    are not exact and a limit below the need costs time; at most `limit`, default the working set.
    cache: of freed buffers, what is left of that, at most a quarter of it.
    wired: what stays resident, on Metal alone, the same as memory.
    """
    most = working_set() if limit is None else limit
    memory = min(int(1.25 * plan.peak), most)
    chosen = {"memory": memory, "cache": max(0, min(most - memory, memory // 4))}
    setters = {"memory": mx.set_memory_limit, "cache": mx.set_cache_limit}
    if runtime.backend() == "metal":
        chosen["wired"], setters["wired"] = memory, mx.set_wired_limit
    before = {name: setters[name](size) for name, size in chosen.items()}
    try:
        yield chosen
    finally:
        for name, size in before.items():
            setters[name](size)


def readable(size: int) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
