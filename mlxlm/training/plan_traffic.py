"""What the processes of a mesh say to each other in a training step, by kind, and the arithmetic that they do.

Counts what grows with model or data; numbers of targets, norms and the like are a few bytes a step. The operations are
those of `mlxlm.distributed`; bytes on the wire are those of a ring, as of n ranks each sends 2 (n - 1) / n of an array
that is summed and (n - 1) / n of one that is gathered or scattered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mlxlm.distributed.buckets import BUCKET_BYTES
from mlxlm.layers import BlockSpec
from mlxlm.training.plan import MemoryPlan, PlanSettings
from mlxlm.training.plan_mesh import Layer, Layout, Model, Share, Shares, memory_of, numbers
from mlxlm.training.plan_weights import WIDTHS


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of communication of a process in a step.

    operation: "sum", "gather", "scatter" or "send".  group: of `Parallel`, "data", "tensor", "stages" or "sequence".
    ranks: of the group.  calls: messages.  payload: bytes, of the whole arrays that are summed, gathered or scattered.
    in_batch: whether it is part of every batch's passes, else of the update.
    """

    kind: str
    operation: str
    group: str
    ranks: int
    calls: int
    payload: int
    in_batch: bool

    @property
    def sent(self) -> float:
        """Bytes that a process sends."""
        parts = {"sum": 2 * (self.ranks - 1) / self.ranks, "send": 1.0}
        return self.payload * parts.get(self.operation, (self.ranks - 1) / self.ranks)


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """The plan of the processes of one stage.

    in_flight: batches whose inputs a pipeline keeps.  handed: bytes of each.
    operations: floating-point ones of a step.
    """

    stage: int
    memory: MemoryPlan
    in_flight: int
    handed: int
    traffic: tuple[Traffic, ...]
    operations: float


def predict_mesh(model: Model, settings: PlanSettings, layout: Layout) -> list[RankPlan]:
    """The plan of each stage's processes.

    settings: batch_size and length are those of all processes together; accumulation are the batches of an update,
    those that a pipeline has in flight.  Raises UsageError where the layout can't share the model.
    """
    return predicted(Shares(model), layout, settings)


def predicted(shares: Shares, layout: Layout, settings: PlanSettings) -> list[RankPlan]:
    """`predict_mesh` of shares that are there already."""
    return [
        RankPlan(
            stage=share.stage, memory=memory_of(share), in_flight=share.in_flight, handed=share.handed(share.stage),
            traffic=tuple(one for one in _traffic(share) if one.ranks > 1 and one.payload),
            operations=_operations(share),
        )
        for share in shares.of(layout, settings)
    ]  # fmt: skip


def _traffic(share: Share) -> Iterator[Traffic]:
    yield from _data(share)
    yield from _tensor(share)
    yield from _stages(share)
    yield from _sequence(share)


def _data(share: Share) -> Iterator[Traffic]:
    """Gradients over the replicas, and the weights that they share."""
    settings, layout = share.settings, share.layout
    width, ranks = WIDTHS[settings.dtype], layout.data
    keep = 4 if settings.master_weights else width
    piped = layout.mesh.pp > 1

    def one(kind: str, operation: str, payload: int, in_batch: bool, least: int = 1) -> Traffic:
        each = -(-payload // settings.accumulation) if in_batch else payload
        calls = max(least, -(-each // BUCKET_BYTES)) * (settings.accumulation if in_batch else 1)
        return Traffic(
            kind=kind, operation=operation, group="data", ranks=ranks, calls=calls, payload=payload, in_batch=in_batch
        )

    if not layout.sharded:
        size = width if piped or settings.accumulation == 1 else keep
        yield one("gradients", "sum", share.weights.trained * size, False)
        return
    filled = {name: ranks * prod(shape) for name, shape in share.kept.shapes.items()}
    apart = sum(size for name, size in filled.items() if name not in share.layered)
    # A pipeline puts weights together and gradients apart once for all of its batches.
    times, every = (1, False) if piped else (settings.accumulation, True)
    yield one("weights", "gather", times * apart * width, every)
    if layout.zero == 1:
        yield one("gradients", "sum", share.weights.trained * keep, False)
    else:
        yield one("gradients", "scatter", times * apart * keep, every)
    layered = sum(filled[name] for name in share.layered)
    frozen, packed = share.frozen_shards
    forward, batches = _forward_passes(share, again=True), settings.accumulation
    count = sum(len(layers) for _, _, layers in share.stacks())
    gathered = batches * forward * (layered * width + ranks * (frozen * width + packed))
    yield one("weights of layers", "gather", gathered, True, forward * count)
    yield one("gradients of layers", "scatter", batches * layered * width, True, count)


def _forward_passes(share: Share, again: bool) -> int:
    """How often a layer runs forward for a batch: once more for its gradients when computed again, and once more where
    a stage hands on what it makes before gradients come.
    """
    return 1 + again + (not share.is_last)


def _tensor(share: Share) -> Iterator[Traffic]:
    """Sums at the ends of shared regions forward, at their beginnings backward; see regions.py."""
    settings, ranks = share.settings, share.layout.mesh.tp
    rows, batches, width = settings.batch_size, settings.accumulation, WIDTHS[settings.dtype]
    column = rows * share.config.dim * width  # bytes of one column of all rows
    forward = backward = forward_calls = backward_calls = 0
    for name, length, layers in share.stacks():
        for number, layer in layers:
            crossing = isinstance(layer, BlockSpec) and layer.cross_attention is not None
            passes = _forward_passes(share, share.again(number))
            forward += passes * (2 + crossing) * length * column
            forward_calls += passes * (2 + crossing)
            backward += ((2 + crossing) * length + crossing * settings.length) * column
            backward_calls += 2 + 2 * crossing
        if share.stages.begins(share.stage, name):
            forward += _forward_passes(share, False) * length * column
            forward_calls += _forward_passes(share, False)
    if share.is_last and share.config.predicts_words:
        tokens = max(1, int(rows * share.target_length * settings.targets))  # that have a target
        backward, backward_calls = backward + tokens * share.config.dim * width, backward_calls + 1
        losses = batches * ranks * 3 * 4 * tokens
        yield _in_batch("loss by words", "gather", "tensor", ranks, batches, losses)
    yield _in_batch("forward", "sum", "tensor", ranks, batches * forward_calls, batches * forward)
    yield _in_batch("backward", "sum", "tensor", ranks, batches * backward_calls, batches * backward)
    keep = 4 if settings.master_weights else width
    several = settings.accumulation > 1 and share.layout.mesh.pp == 1
    size, times = (keep, settings.accumulation if several else 1) if share.layout.sharded else (width, 1)
    if several and not share.layout.sharded:
        size = keep
    yield Traffic(
        kind="gradients", operation="sum", group="tensor", ranks=ranks, calls=times,
        payload=times * size * numbers(share.whole), in_batch=times > 1,
    )  # fmt: skip


def _in_batch(kind: str, operation: str, group: str, ranks: int, calls: int, payload: int) -> Traffic:
    return Traffic(
        kind=kind, operation=operation, group=group, ranks=ranks, calls=calls, payload=payload, in_batch=True
    )


def _stages(share: Share) -> Iterator[Traffic]:
    """What a stage hands on, what it gives back, and gradients of what several stages hold."""
    ranks, batches = share.layout.mesh.pp, share.settings.accumulation
    on = 0 if share.is_last else share.handed(share.stage + 1)
    back = share.handed(share.stage)
    yield _in_batch("hidden states", "send", "stages", ranks, batches, batches * on)
    yield _in_batch("gradients of hidden states", "send", "stages", ranks, batches, batches * back)
    width = WIDTHS[share.settings.dtype]
    size = 4 if share.layout.sharded and share.settings.master_weights else width
    by_holders: dict[int, int] = {}
    for name, shape in share.kept.shapes.items():
        if ranks == 1 or ".layers." in name:
            continue
        holders = len(share.stages.holders(name))
        by_holders[holders] = by_holders.get(holders, 0) + prod(shape) * size
    for holders, payload in by_holders.items():
        yield Traffic(
            kind="gradients of tied weights", operation="sum", group="stages", ranks=holders,
            calls=-(-payload // BUCKET_BYTES), payload=payload, in_batch=False,
        )  # fmt: skip


def _sequence(share: Share) -> Iterator[Traffic]:
    """Keys and values round the ring; backward with their gradients, which make one more step home."""
    settings, ranks = share.settings, share.layout.mesh.sp
    batches, width = settings.accumulation, WIDTHS[settings.dtype]
    forward = backward = forward_calls = backward_calls = 0
    for _, length, layers in share.stacks():
        for number, layer in layers:
            held = [(layer.attention, length)]
            if isinstance(layer, BlockSpec) and layer.cross_attention is not None:
                held.append((layer.cross_attention, settings.length))
            for attention, columns in held:
                values = 2 * settings.batch_size * columns * attention.num_kv_heads * attention.head_dim
                passes = _forward_passes(share, share.again(number))
                forward += passes * (ranks - 1) * values * width
                forward_calls += passes * 2 * (ranks - 1)
                backward += values * ((ranks - 1) * (width + 4) + 4)
                backward_calls += 4 * (ranks - 1) + 2
    yield _in_batch("ring forward", "send", "sequence", ranks, batches * forward_calls, batches * forward)
    yield _in_batch("ring backward", "send", "sequence", ranks, batches * backward_calls, batches * backward)


def _operations(share: Share) -> float:
    """Two for each weight and token, and attention's; gradients take twice as many, or as many of frozen matrices."""
    settings, sp = share.settings, share.layout.mesh.sp
    total = 0.0
    for name, length, layers in share.stacks():
        tokens = settings.batch_size * length
        for number, layer in layers:
            learns = share.weights.feeds_own_products(f"{name}.layers.{number}")
            passes = _forward_passes(share, share.again(number)) + (2 if learns else 1)
            total += passes * tokens * _of_layer(layer, length * sp, settings.length * sp, sp)
    if share.is_last and share.config.predicts_words:
        words = -(-share.config.head.vocab_size // share.layout.mesh.tp)
        learns = share.weights.feeds_product("embeddings.token" if share.config.head.tied else "head.output")
        tokens = settings.batch_size * share.target_length * settings.targets
        total += (3 if learns else 2) * 2 * tokens * share.config.head.dim * words
    return total * settings.accumulation


def _of_layer(layer: Layer, keys: int, memory: int, sp: int) -> float:
    """Forward operations of a layer for a token; of a causal one for the last part of a row, which sees most.

    keys, memory: of a whole row.
    """
    own, crossing = layer.attention, getattr(layer, "cross_attention", None)
    seen = min(keys, own.window or keys) * (1 - 1 / (2 * sp) if own.causal else 1)
    total = 2.0 * layer.feed_forward.hidden_dim * own.dim * (3 if layer.feed_forward.gated else 2)
    for spec, there in [(own, seen)] + ([] if crossing is None else [(crossing, memory)]):
        total += 2 * spec.dim * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)
        total += 4 * there * spec.num_heads * spec.head_dim
    return total
