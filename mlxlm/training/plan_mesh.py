"""The plan of a run under a mesh: memory, traffic and arithmetic of the processes of each stage, before any starts.

As the plan of one process, it is made of shapes alone: each array is cut as `mlxlm.distributed` cuts it. Of the ranks
that share something unevenly it describes the first, which has most.

    plan = predict_mesh(model, PlanSettings(batch_size=8, length=2048), Layout(mesh=Mesh(dp=2, tp=2), zero=3))
    max(rank.memory.peak for rank in plan)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxlm.distributed import Joined, Mesh
from mlxlm.distributed.buckets import BUCKET_BYTES
from mlxlm.distributed.parallel import ELEMENTWISE
from mlxlm.distributed.pipeline import order
from mlxlm.distributed.stages import StagePlan
from mlxlm.distributed.tensor_plan import TensorPlan
from mlxlm.errors import UsageError
from mlxlm.layers import AttentionSpec, BlockSpec, ParallelBlockSpec
from mlxlm.models import Transformer, TransformerConfig
from mlxlm.models.config import StackSpec
from mlxlm.training.packing import JOINED
from mlxlm.training.plan import MemoryPlan, MemoryPlanError, PlanSettings, loss_bytes, readable, working_set
from mlxlm.training.plan_activations import Activations, Trained, stack_activations
from mlxlm.training.plan_weights import STATES, WIDTHS, Weights

Layer = BlockSpec | ParallelBlockSpec
Model = Transformer | TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How processes share a run.

    mesh: see `Mesh`.  zero: what replicas share, 0 nothing to 3 everything.  schedule: of a pipeline, 1f1b or gpipe.
    """

    mesh: Mesh
    zero: int = 0
    schedule: str = "1f1b"

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise UsageError(f"zero is {self.zero!r}; expected 0, 1, 2 or 3")
        next(order(self.schedule, 1, 0, 1))

    def __str__(self) -> str:
        return f"{self.mesh} zero={self.zero}" if self.zero else str(self.mesh)

    @property
    def data(self) -> int:
        """Processes with the same part of the model and other data."""
        return self.mesh.dp * self.mesh.sp

    @property
    def sharded(self) -> bool:
        """Whether they share what they would hold alike."""
        return bool(self.zero) and self.data > 1

    def check(self, config: TransformerConfig, settings: PlanSettings) -> None:
        """Raise UsageError where model, rows or optimizer can't be shared so."""
        self.mesh.check(config)
        if settings.batch_size < self.mesh.dp:
            raise UsageError(f"dp={self.mesh.dp}: a batch of {settings.batch_size} rows can't be shared by so many")
        if self.mesh.sp > 1 and not config.predicts_words:
            raise UsageError(f"sp={self.mesh.sp}: only for models that predict words")
        if self.mesh.sp > settings.length:
            raise UsageError(f"sp={self.mesh.sp}: rows have {settings.length} tokens")
        if (self.sharded or self.mesh.tp > 1) and settings.optimizer not in ELEMENTWISE:
            raise UsageError(f"{settings.optimizer} looks at whole matrices; use {' or '.join(ELEMENTWISE)}")


def plan_here(
    model: Model, settings: PlanSettings, joined: Joined, *, refuse: bool, limit: int | None = None
) -> MemoryPlan:
    """The plan of this process of a run; all processes call it together.

    settings: of all processes together.  refuse: whether to raise MemoryPlanError, in all of them, where one can't fit.
    limit: bytes of this process, default an equal part of its machine's working set.
    """
    layout = Layout(mesh=joined.mesh, zero=joined.zero, schedule=joined.schedule)
    shares, stage = Shares(model), joined.mesh.place(joined.world.rank)["pp"]
    plan = memory_of(shares.of(layout, settings)[stage])
    if not refuse:
        return plan
    limit = working_set() // joined.world.processes_here if limit is None else limit
    problem = ""
    if plan.peak > limit:
        problem = (
            f"a step needs {readable(plan.peak)} in rank {joined.world.rank}, but {readable(limit)} may be used there"
            f"{_what_would_fit(shares, settings, layout, stage, limit)}"
        )
    problems = [text for text in joined.world.texts(problem, "the memory plan") if text]
    if problems:
        raise MemoryPlanError(problems[0])
    return plan


def _what_would_fit(shares: Shares, settings: PlanSettings, layout: Layout, stage: int, limit: int) -> str:
    """Flags, as the end of a sentence, with which a stage's processes fit, the cheapest of those that do."""
    for again in (settings.recompute_layers, -1):
        for zero in range(layout.zero, 4 if layout.data > 1 else layout.zero + 1):
            candidate = replace(settings, recompute_layers=again)
            if memory_of(shares.of(replace(layout, zero=zero), candidate)[stage]).peak <= limit:
                flags = f" --zero {zero}" * (zero != layout.zero)
                flags += f" --recompute-layers {again}" * (again != settings.recompute_layers)
                return f";{flags} would fit"
    return "; use more processes along tp or pp (mlxlm plan --machines recommends a mesh), or smaller batches"


class Array(NamedTuple):
    """An array of a model.  bytes: as it is held now.  packed: of a quantized matrix, whatever is computed in."""

    shape: tuple[int, ...]
    bytes: int
    trained: bool
    packed: bool


def arrays_of(model: Model) -> dict[str, Array]:
    """All arrays of a model, its adapters included, by name; of a configuration as if all of them were trained."""
    with mx.stream(mx.cpu):
        if isinstance(model, TransformerConfig):
            model = Transformer(model)
        trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
        return {
            name: Array(
                tuple(array.shape), array.nbytes, name in trained, name not in trained and _is_packed(name, array)
            )
            for name, array in tree_flatten(model.parameters())
        }


def _is_packed(name: str, array: mx.array) -> bool:
    return not mx.issubdtype(array.dtype, mx.floating) or name.rpartition(".")[2] in ("scales", "biases")


@dataclass(frozen=True)
class Share:
    """What a process of one stage has of model and data.

    settings: with its own rows and columns.  weights: the trained ones that it computes with.  layered: those that are
    shards between layers (ZeRO 3), as shards.  kept: the trained ones that it updates.
    frozen: numbers, and bytes of packed ones.  frozen_shards: of them, what is in layers that are shards.
    whole: shapes before tensor parallelism of the trained ones whose gradients tensor ranks add up.
    layers: the weights of the layers of each stack, counted from the first that is here.
    """

    config: TransformerConfig
    layout: Layout
    stages: StagePlan
    stage: int
    settings: PlanSettings
    weights: Weights
    frozen: tuple[int, int]
    layered: Mapping[str, tuple[int, ...]]
    frozen_shards: tuple[int, int]
    kept: Weights
    whole: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, Weights]

    @property
    def target_length(self) -> int:
        """Columns that the decoder, or the only stack, has here."""
        if self.config.has_memory:
            return self.settings.target_length or self.settings.length
        return self.settings.length

    @property
    def is_last(self) -> bool:
        """Whether it makes the loss."""
        return self.stages.is_last(self.stage)

    def stacks(self) -> list[tuple[str, int, list[tuple[int, Layer]]]]:
        """Each stack with layers here: its name, columns, and its layers by number, with this process's heads."""
        found = []
        for name, length in (("encoder", self.settings.length), ("decoder", self.target_length)):
            numbers = self.stages.layers(self.stage, name)
            if numbers:
                layers = getattr(self.config, name).layers
                found.append((name, length, [(n, shared_layer(layers[n], self.layout.mesh.tp)) for n in numbers]))
        return found

    def again(self, number: int) -> bool:
        """Whether a layer is computed again for the gradients."""
        every = self.settings.recompute_layers < 0 or (self.layout.zero == 3 and self.layout.data > 1)
        return every or number < self.settings.recompute_layers

    def handed(self, stage: int) -> int:
        """Bytes of a batch that come into a stage from the one before; 0 for the first."""
        if stage == 0:
            return 0
        columns = self.target_length
        if self.config.has_memory:
            ahead = bool(self.stages.layers(stage - 1, "decoder"))
            columns = self.settings.length + (self.target_length if ahead else 0)
        return self.settings.batch_size * columns * self.config.dim * WIDTHS[self.settings.dtype]

    @property
    def in_flight(self) -> int:
        """The most batches whose inputs a stage of a pipeline keeps at once."""
        held = most = 0
        if self.layout.mesh.pp == 1:
            return 1
        for what, _ in order(self.layout.schedule, self.layout.mesh.pp, self.stage, self.settings.accumulation):
            held += 1 if what == "forward" else -1
            most = max(most, held)
        return most


@functools.lru_cache(maxsize=512)
def shared_layer(layer: Layer, tp: int) -> Layer:
    """A layer with the heads and features that the first of tp processes has of it."""

    def shared(spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, num_heads=spec.num_heads // tp, num_kv_heads=max(1, spec.num_kv_heads // tp))

    feed_forward = replace(layer.feed_forward, hidden_dim=layer.feed_forward.hidden_dim // tp)
    changes = {"attention": shared(layer.attention), "feed_forward": feed_forward}
    if isinstance(layer, BlockSpec) and layer.cross_attention is not None:
        changes["cross_attention"] = shared(layer.cross_attention)
    return replace(layer, **changes)


class _Local(NamedTuple):
    """What a stage's first tensor rank computes with.  frozen: name, numbers, bytes where packed, else 0.

    layers: the weights of each stack's layers, these counted from the stage's first.
    """

    weights: Weights
    frozen: list[tuple[str, int, int]]
    whole: dict[str, tuple[int, ...]]
    layers: dict[str, Weights]


class Shares:
    """The shares of a model for any layout; what several layouts have in common is worked out once."""

    def __init__(self, model: Model):
        self.config = model if isinstance(model, TransformerConfig) else model.config
        self.arrays = arrays_of(model)
        self._stages: dict[int, StagePlan] = {}
        self._locals: dict[tuple[int, int, int], _Local] = {}

    def of(self, layout: Layout, settings: PlanSettings) -> list[Share]:
        """One for each stage. Raises UsageError for a layout that can't share the model."""
        layout.check(self.config, settings)
        pp, mesh = layout.mesh.pp, layout.mesh
        if pp not in self._stages:
            self._stages[pp] = StagePlan.of(self.config, pp)
        own = replace(
            settings,
            batch_size=-(-settings.batch_size // mesh.dp),
            length=-(-settings.length // mesh.sp),
            target_length=None if settings.target_length is None else -(-settings.target_length // mesh.sp),
        )
        return [self._share(layout, stage, own) for stage in range(pp)]

    def _local(self, tp: int, pp: int, stage: int) -> _Local:
        if (tp, pp, stage) not in self._locals:
            plan, shapes, frozen, whole = TensorPlan(self.config, tp, 0), {}, [], {}
            for name, array in self.arrays.items():
                if not self._stages[pp].has(stage, name):
                    continue
                size = plan.piece(name, array.shape).size
                if array.trained:
                    shapes[name] = size
                    if plan.summed(name):
                        whole[name] = array.shape
                else:
                    packed = array.bytes * prod(size) // max(1, prod(array.shape)) if array.packed else 0
                    frozen.append((name, 0 if array.packed else prod(size), packed))
            layers = {stack: self._layers(pp, stage, stack, shapes) for stack in ("encoder", "decoder")}
            self._locals[tp, pp, stage] = _Local(Weights(0, 0, shapes), frozen, whole, layers)
        return self._locals[tp, pp, stage]

    def _layers(self, pp: int, stage: int, stack: str, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
        first, found = min(self._stages[pp].layers(stage, stack), default=0), {}
        for name, shape in shapes.items():
            if name.startswith(f"{stack}.layers."):
                number, rest = name.removeprefix(f"{stack}.layers.").split(".", 1)
                found[f"{stack}.layers.{int(number) - first}.{rest}"] = shape
        return Weights(0, 0, found)

    def _share(self, layout: Layout, stage: int, settings: PlanSettings) -> Share:
        local, ranks = self._local(layout.mesh.tp, layout.mesh.pp, stage), layout.data
        in_shards = layout.zero == 3 and ranks > 1
        kept, layered = local.weights, {}
        if layout.sharded:
            kept = Weights(0, 0, {name: _shard(shape, ranks) for name, shape in local.weights.shapes.items()})
        if in_shards:
            layered = {name: shape for name, shape in kept.shapes.items() if ".layers." in name}
        floats = packed = float_shards = packed_shards = 0
        for name, count, size in local.frozen:
            if in_shards and ".layers." in name:
                count, size = -(-count // ranks), -(-size // ranks)
                float_shards, packed_shards = float_shards + count, packed_shards + size
            floats, packed = floats + count, packed + size
        whole = {name: layered.get(name, shape) for name, shape in local.whole.items()}
        return Share(
            self.config, layout, self._stages[layout.mesh.pp], stage, settings, local.weights, (floats, packed),
            layered, (float_shards, packed_shards), kept, whole, local.layers,
        )  # fmt: skip


def _shard(shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    return (-(-shape[0] // ranks), *shape[1:]) if shape else shape


def numbers(shapes: Mapping[str, Sequence[int]]) -> int:
    """Numbers in arrays of these shapes."""
    return sum(map(prod, shapes.values()))


def memory_of(share: Share) -> MemoryPlan:
    """The memory of a process in a step. What a pipeline keeps of batches in flight is with the activations."""
    settings, layout, weights = share.settings, share.layout, share.weights
    width, several = WIDTHS[settings.dtype], settings.accumulation > 1
    keep = 4 if settings.master_weights else width
    kept, in_layers = share.kept.trained, numbers(share.layered)
    whole = weights.trained - numbers({name: weights.shapes[name] for name in share.layered})  # for all of a step
    masters = kept if keep != width else kept - in_layers if layout.sharded else 0
    piped = layout.mesh.pp > 1
    added = width if piped else keep  # a pipeline adds gradients up as they come
    gradients = (whole + in_layers) * width
    if layout.sharded and layout.zero == 1:
        gradients = whole * keep
    elif several and not layout.sharded:
        gradients = whole * added
    summed = 0
    if several:
        summed = (whole + in_layers) * added if piped or layout.zero < 2 or not layout.sharded else kept * keep
    update = max(2 * 4 * share.kept.joined(JOINED), (STATES[settings.optimizer] + 1) * keep * share.kept.largest)
    if layout.data > 1:
        update = max(update, 2 * min(BUCKET_BYTES, gradients))  # a bucket and its sum
    mine, gathered = _activations(share), _gathered_layer(share) * width
    local = share.config
    if local.predicts_words:
        words = -(-local.head.vocab_size // layout.mesh.tp)
        local = replace(local, head=replace(local.head, vocab_size=words))
    return MemoryPlan(
        weights=(share.frozen[0] + whole + in_layers) * width + share.frozen[1],
        master_weights=masters * keep,
        average=4 * kept if settings.average else 0,
        optimizer=share.kept.states(settings.optimizer) * keep,
        gradients=gradients,
        summed=summed,
        update=update,
        activations=mine.kept + (share.in_flight * share.handed(share.stage) if piped else 0),
        backward=mine.backward + 2 * gathered,
        loss=loss_bytes(local, settings, weights, width, mine) if share.is_last else 0,
    )


def _activations(share: Share) -> Activations:
    """Of one batch; a stage of a pipeline makes them again when its gradients come."""
    settings, weights = share.settings, share.weights
    kept, backward = 0.0, 0.0
    below = share.stage > 0 or bool(weights.under("embeddings") or weights.under("prompt"))
    for name, length, layers in share.stacks():
        again = sum(share.again(number) for number, _ in layers)
        stack = StackSpec(layers=tuple(layer for _, layer in layers), norm=getattr(share.config, name).norm)
        trained = Trained(share.layers[name], f"{name}.layers", below)
        one, largest = stack_activations(
            stack, replace(settings, recompute_layers=again), settings.batch_size, length, trained
        )
        below = below or bool(weights.under(name))
        ring = _ring_bytes(share, length, [layer for _, layer in layers])
        kept, backward = kept + one, max(backward, largest + ring)
    embedded = settings.batch_size * sum(length for _, length, _ in share.stacks()) * share.config.dim
    return Activations(int((kept + 2 * embedded) * WIDTHS[settings.dtype]), int(backward), share.target_length)


def _ring_bytes(share: Share, length: int, layers: Sequence[Layer]) -> int:
    """Keys, values and their gradients that travel in the backward pass of ring attention, and those that come."""
    if share.layout.mesh.sp == 1:
        return 0
    widest = max(layer.attention.num_kv_heads * layer.attention.head_dim for layer in layers)
    return 2 * 2 * share.settings.batch_size * length * widest * (WIDTHS[share.settings.dtype] + 4)


def _gathered_layer(share: Share) -> int:
    """Numbers of the largest layer that ZeRO 3 puts together while it runs."""
    sizes: dict[str, int] = {}
    for name in share.layered:
        layer = ".".join(name.split(".")[:3])
        sizes[layer] = sizes.get(layer, 0) + prod(share.weights.shapes[name])
    return max(sizes.values(), default=0)
