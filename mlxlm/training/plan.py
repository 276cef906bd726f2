"""The memory plan: what a training step will take, in bytes by part, before anything is loaded.

Computed from the configuration of the model alone. Two moments of a step may be the largest: the start of the backward
pass, when all activations are alive, and the update, when all gradients are and the optimizer works on the largest
weights. The plan is the larger of both.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlxlm import runtime
from mlxlm.errors import MlxlmError, UsageError, nearest
from mlxlm.kernels.cross_entropy import default_chunk
from mlxlm.models import Transformer, TransformerConfig
from mlxlm.training.plan_activations import Activations, activations_of

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Float32 arrays of the optimizer's state for each trained one.
_STATES = {"adamw": 2, "lion": 1, "sgd": 1, "muon": 1, "adafactor": 0}


class MemoryPlanError(MlxlmError):
    """A run can't fit the memory; the text says which settings would."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What a plan depends on besides the model.

    batch_size: rows of one pass.  accumulation: passes of one update, default 1.  length: tokens of a row.
    target_length: tokens of a decoder behind an encoder, default as many.
    trained: parameters that are trained, None for all of the model's; further ones are added to the model's.
    dtype: to compute in.  master_weights: trained weights, gradients and state in float32.  optimizer: its name.
    recompute_layers: layers of each stack that are computed again, -1 for all.  chunk: words of the loss at once, None
    for the kernel's choice.  targets: share of the tokens that are predicted, default 1.
    """

    batch_size: int
    length: int
    accumulation: int = 1
    target_length: int | None = None
    trained: int | None = None
    dtype: str = "float32"
    master_weights: bool = True
    optimizer: str = "adamw"
    recompute_layers: int = 0
    chunk: int | None = None
    targets: float = 1.0

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise UsageError(f"unknown dtype {self.dtype!r}{nearest(self.dtype, BYTES)}")
        if self.optimizer not in _STATES:
            raise UsageError(f"unknown optimizer {self.optimizer!r}{nearest(self.optimizer, _STATES)}")
        if min(self.batch_size, self.length, self.accumulation) < 1:
            raise UsageError("batch size, length and accumulation are at least 1")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of a training step by part.

    weights: in the dtype of the computation.  master_weights: their float32 copies.  optimizer: its state.
    gradients: of what is trained.  update: what the optimizer works with on its largest weights.
    activations: kept for the gradients.  recomputation: of one layer that is computed again, while it is.
    attention: scores that exist at once.  loss: of a chunk of the logits, and the hidden states' gradients.
    """

    weights: int
    master_weights: int
    optimizer: int
    gradients: int
    update: int
    activations: int
    recomputation: int
    attention: int
    loss: int

    @property
    def lasting(self) -> int:
        """What exists between steps."""
        return self.weights + self.master_weights + self.optimizer

    @property
    def peak(self) -> int:
        """The most that exists at once."""
        forward = self.activations + max(self.loss, self.recomputation + self.attention)
        return self.lasting + max(forward, self.gradients + self.update)

    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def parameter_sizes(config: TransformerConfig) -> dict[str, int]:
    """Elements of each parameter by name. MLX computes nothing before it must, so this takes no memory."""
    with mx.stream(mx.cpu):
        return {name: prod(array.shape) for name, array in tree_flatten(Transformer(config).parameters())}


def low_rank_parameters(config: TransformerConfig, rank: int) -> int:
    """Parameters that adapters of a rank add to all linear layers of all blocks (Hu et al. 2021, arXiv:2106.09685)."""
    model = Transformer(config)
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    return sum(rank * sum(module.weight.shape) for module in linears)


def predict(config: TransformerConfig, settings: PlanSettings) -> MemoryPlan:
    """The memory of a training step."""
    sizes = parameter_sizes(config)
    return _predict(config, settings, sum(sizes.values()), max(sizes.values()))


def _predict(config: TransformerConfig, settings: PlanSettings, total: int, largest: int) -> MemoryPlan:
    full = settings.trained is None
    trained = total if full else settings.trained
    width = BYTES[settings.dtype]
    kept = 4 if settings.master_weights else width
    mine = activations_of(config, settings, full)
    return MemoryPlan(
        weights=total * width if full else (total + trained) * width,
        master_weights=trained * kept if kept != width else 0,
        optimizer=trained * kept * _STATES[settings.optimizer],
        gradients=trained * kept * (2 if settings.accumulation > 1 else 1),
        update=5 * kept * (largest if full else max(trained // 16, 1)),
        activations=mine.kept,
        recomputation=mine.recomputed,
        attention=mine.attention,
        loss=_loss_bytes(config, settings, full, width, mine),
    )


def _loss_bytes(config: TransformerConfig, settings: PlanSettings, full: bool, width: int, mine: Activations) -> int:
    if not config.predicts_words:
        return 0
    tokens = max(1, int(settings.batch_size * mine.target_length * settings.targets))
    words = config.head.vocab_size
    chunk = min(settings.chunk or default_chunk(tokens, words, trained=full), words)
    head = config.head.dim * words * width
    gradient = 2 * head if full else 0  # its chunks, then all of them joined
    return 3 * 4 * tokens * chunk + 2 * 4 * tokens * config.dim + gradient


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


def fit(config: TransformerConfig, settings: PlanSettings, limit: int | None = None) -> PlanSettings:
    """The fastest settings with the same rows in an update that fit `limit` bytes, default the machine's working set.

    Keeps the largest passes it can, computing layers again before it makes passes smaller: a layer computed again costs
    a third more time, and smaller passes cost it on every layer. Then it halves the chunk of the loss.
    Raises MemoryPlanError, with the longest rows that would fit, when not even one row at a time does.
    """
    limit = working_set() if limit is None else limit
    rows = settings.batch_size * settings.accumulation
    depth = max(len(stack.layers) for stack in (config.encoder, config.decoder) if stack is not None)
    sizes = parameter_sizes(config)
    totals = sum(sizes.values()), max(sizes.values())
    passes = [batch for batch in range(settings.batch_size, 0, -1) if rows % batch == 0]
    for batch in passes:
        for chunk in _chunk_choices(config, settings):
            for count in sorted({0, depth // 2, depth}):
                candidate = replace(
                    settings, batch_size=batch, accumulation=rows // batch, recompute_layers=count, chunk=chunk
                )
                if _predict(config, candidate, *totals).peak <= limit:
                    return candidate
    least = replace(settings, batch_size=1, accumulation=rows, recompute_layers=depth)
    raise MemoryPlanError(_refusal(config, least, limit, totals))


def _chunk_choices(config: TransformerConfig, settings: PlanSettings) -> list[int | None]:
    if settings.chunk is not None or not config.predicts_words:
        return [settings.chunk]
    words = config.head.vocab_size
    return [None, *(chunk for chunk in (4096, 1024) if chunk < words)]


def _refusal(config: TransformerConfig, least: PlanSettings, limit: int, totals: tuple[int, int]) -> str:
    need = _predict(config, least, *totals)
    said = f"a step needs {readable(need.peak)} even with one row at a time and all layers recomputed, but"
    said += f" {readable(limit)} may be used"
    length = least.length
    while length > 16:
        length //= 2
        if _predict(config, replace(least, length=length), *totals).peak <= limit:
            return f"{said}; rows of {length} tokens (--max-seq-length {length}) would fit"
    return (
        f"{said}; its weights, gradients and optimizer alone take {readable(need.lasting + need.gradients)}: train "
        "fewer of them (--method lora) or use a smaller model"
    )


def check(config: TransformerConfig, settings: PlanSettings, limit: int | None = None) -> MemoryPlan:
    """The plan of a run that fits. Raises MemoryPlanError with the settings that would, when this one does not."""
    limit = working_set() if limit is None else limit
    plan = predict(config, settings)
    if plan.peak <= limit:
        return plan
    better = fit(config, settings, limit)
    raise MemoryPlanError(
        f"a step needs {readable(plan.peak)}, but {readable(limit)} may be used; --batch-size {better.batch_size} "
        f"--grad-accumulation-steps {better.accumulation} --recompute-layers {better.recompute_layers}"
        + (f" --loss-chunk {better.chunk}" if better.chunk else "")
        + " would fit"
    )


def largest(config: TransformerConfig, settings: PlanSettings, name: str, limit: int, most: int = 2**20) -> int:
    """The largest value of the setting `name`, "batch_size" or "length", that fits; 0 when none does."""
    sizes = parameter_sizes(config)
    totals = sum(sizes.values()), max(sizes.values())

    def fits(value: int) -> bool:
        return _predict(config, replace(settings, **{name: value}), *totals).peak <= limit

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def set_limits(plan: MemoryPlan, limit: int | None = None) -> dict[str, int]:
    """Hold this process to a plan: MLX's memory limit, and on Metal what it keeps wired; returns what was set.

    Above its memory limit MLX waits for running work instead of running ahead. The limit is the plan's peak and 10%, at
    most `limit`, default the working set; the cache of freed buffers gets what is left of that, at most a quarter.
    """
    most = working_set() if limit is None else limit
    memory = min(int(1.1 * plan.peak), most)
    cache = max(0, min(most - memory, memory // 4))
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    chosen = {"memory": memory, "cache": cache}
    if runtime.backend() == "metal":
        chosen["wired"] = min(memory, most)
        mx.set_wired_limit(chosen["wired"])
    return chosen


def readable(size: int) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
