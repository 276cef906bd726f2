"""Pipeline stages: which layers a process has, and a model that begins and ends in the middle of the stack.

The layers of the encoder and then of the decoder are cut into contiguous stages whose largest cost is as small as can
be. A stage is the model itself with `Absent` in the places of the layers of others, so that names stay what they were.
Between stages travels a dict: "x", the hidden states of the stack at work, and "memory", the encoder's output, for
stages of a decoder behind an encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlxlm.errors import UsageError
from mlxlm.layers.embeddings import Embeddings
from mlxlm.models import Transformer, TransformerConfig
from mlxlm.models.transformer import Stack

Arrays = dict[str, mx.array]


def balanced(costs: Sequence[int], stages: int) -> list[tuple[int, int]]:
    """[start, stop) of each of so many contiguous stages, none of them empty, the largest sum of costs least."""
    count = len(costs)
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[i]: the least largest cost of the first i layers in the stages so far, and where the last one of them begins.
    best: list[tuple[float, int]] = [(0.0, 0)] + [(float("inf"), 0)] * count
    cuts = []
    for _ in range(stages):
        best = [(float("inf"), 0)] + [
            min((max(best[i][0], sums[j] - sums[i]), i) for i in range(j)) for j in range(1, count + 1)
        ]
        cuts.append([start for _, start in best])
    bounds, stop = [], count
    for starts in reversed(cuts):
        bounds.append((starts[stop], stop))
        stop = starts[stop]
    return bounds[::-1]


def layer_costs(config: TransformerConfig) -> list[int]:
    """Parameters of each layer, the encoder's first; the embeddings count with the first, the head with the last."""
    with mx.stream(mx.cpu):
        sizes = {name: array.size for name, array in tree_flatten(Transformer(config).parameters())}
    names = layer_names(config)
    costs = dict.fromkeys(names, 0)
    for name, size in sizes.items():
        place = ".".join(name.split(".")[:3])
        owner = place if place in costs else names[0] if name.startswith("embeddings.") else names[-1]
        costs[owner] += size
    if config.predicts_words and not config.untied:
        costs[names[-1]] += config.embeddings.vocab_size * config.embeddings.dim
    return list(costs.values())


def layer_names(config: TransformerConfig) -> list[str]:
    """Canonical paths of all layers, the encoder's first."""
    stacks = (("encoder", config.encoder), ("decoder", config.decoder))
    return [f"{name}.layers.{n}" for name, spec in stacks if spec is not None for n in range(len(spec.layers))]


@dataclass(frozen=True)
class StagePlan:
    """The layers of every stage.  bounds: [start, stop) of each among all layers, the encoder's first."""

    config: TransformerConfig
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, config: TransformerConfig, stages: int) -> StagePlan:
        """The balanced plan. Raises UsageError for more stages than layers."""
        costs = layer_costs(config)
        if stages > len(costs):
            raise UsageError(f"pp={stages}: the model has {len(costs)} layers; pp={len(costs)} would do")
        return cls(config, tuple(balanced(costs, stages)))

    def layers(self, stage: int, stack: str) -> range:
        """The numbers of the layers of a stack that a stage has."""
        spec = getattr(self.config, stack)
        if spec is None:
            return range(0)
        before = len(self.config.encoder.layers) if stack == "decoder" and self.config.encoder is not None else 0
        start, stop = (min(max(bound - before, 0), len(spec.layers)) for bound in self.bounds[stage])
        return range(start, stop)

    def begins(self, stage: int, stack: str) -> bool:
        """Whether a stage has the first layer of a stack, so that tokens come in there."""
        return 0 in self.layers(stage, stack)

    def ends(self, stage: int, stack: str) -> bool:
        """Whether a stage has the last layer of a stack."""
        spec = getattr(self.config, stack)
        return spec is not None and len(spec.layers) - 1 in self.layers(stage, stack)

    def is_last(self, stage: int) -> bool:
        """Whether a stage makes the loss."""
        return stage == len(self.bounds) - 1

    def parts_of_embeddings(self, stage: int) -> str:
        """What of the embeddings a stage needs: "all", "token" for a tied head, or "none"."""
        if self.begins(stage, "encoder") or self.begins(stage, "decoder"):
            return "all"
        tied = self.config.predicts_words and not self.config.untied
        return "token" if self.is_last(stage) and tied else "none"

    def has(self, stage: int, name: str) -> bool:
        """Whether a stage has a parameter, given by its canonical name."""
        first, *rest = name.split(".")
        if first == "embeddings":
            part = self.parts_of_embeddings(stage)
            return part == "all" or (part == "token" and rest[0] == "token")
        if first in ("encoder", "decoder"):
            if rest[0] == "layers":
                return int(rest[1]) in self.layers(stage, first)
            return bool(self.layers(stage, first)) if rest[0] == "positions" else self.ends(stage, first)
        return self.is_last(stage)

    def holders(self, name: str) -> tuple[int, ...]:
        """The stages that have a parameter; several for tied tables and positions that a stack shares."""
        return tuple(stage for stage in range(len(self.bounds)) if self.has(stage, name))


class Absent(nn.Module):
    """A layer that another stage has."""

    def __call__(self, x: mx.array, scope: Any, cache: Any = None, memory: mx.array | None = None) -> mx.array:
        """x as it is; a cache only counts."""
        if cache is not None:
            cache.length += x.shape[1]
        return x


class StageStack(Stack):
    """A stack of which only some layers are here."""

    def enter(self, x: mx.array) -> mx.array:
        """See `Stack`."""
        return super().enter(x) if self._begins else x

    def leave(self, x: mx.array) -> mx.array:
        """See `Stack`."""
        return super().leave(x) if self._ends else x


class StageEmbeddings(Embeddings):
    """Embeddings that give what the stage before has handed on, where there is such."""

    def __call__(self, *arguments: Any, **keywords: Any) -> mx.array:
        """See `Embeddings`."""
        return super().__call__(*arguments, **keywords) if self._handed is None else self._handed


class StageTransformer(Transformer):
    """One stage of a model; made by `split_stages`. `_given` holds what the stage before it gave.

    Called for generation it talks to the other stages itself, see `relay`; in training a schedule does.
    """

    def encode(self, tokens: mx.array, **keywords: Any) -> mx.array:
        """The encoder's output, or this stage's part of the way there."""
        plan, stage = self._stages, self._stage
        if self._relay is not None:
            return self._relayed_encode(tokens, keywords)
        if not plan.layers(stage, "encoder"):
            return self._given["memory"]
        return self._run("encoder", lambda: Transformer.encode(self, tokens, **keywords))

    def decode(self, tokens: mx.array, memory: mx.array, **keywords: Any) -> mx.array:
        """The decoder's output, or this stage's part of the way there; memory itself in stages of the encoder."""
        if not self._stages.layers(self._stage, "decoder"):
            return memory
        if self._relay is None:
            return self._run("decoder", lambda: Transformer.decode(self, tokens, memory, **keywords))
        return self._relayed(lambda: self.decode(tokens, memory, **keywords), "decoder")

    def hidden(self, tokens: mx.array, **keywords: Any) -> mx.array:
        """The last hidden states at the last stage, this stage's elsewhere."""
        if self.config.has_memory:
            return self._hidden(tokens, **keywords)
        stack = "encoder" if self.config.decoder is None else "decoder"
        if self._relay is None:
            return self._run(stack, lambda: self._hidden(tokens, **keywords))
        return self._relayed(lambda: self.hidden(tokens, **keywords), stack)

    def logits(self, hidden: mx.array, key_lengths: mx.array | None = None) -> mx.array:
        """The logits that the last stage makes; while relaying all stages have them."""
        if self._relay is None:
            return super().logits(hidden, key_lengths)
        relay, last = self._relay, len(self._stages.bounds) - 1
        if self._stage != last:
            return relay.receive(last, "logits")
        made = super().logits(hidden, key_lengths)
        for stage in range(last):
            relay.send(made, stage, "logits")
        return made

    def join_projections(self) -> None:
        """See `Transformer`, for the layers of this stage."""
        for stack in ("encoder", "decoder"):
            for number in self._stages.layers(self._stage, stack):
                layer = getattr(self, stack).layers[number]
                layer.attention.join()
                layer.feed_forward.join()

    def handed_on(self, hidden: mx.array) -> Arrays:
        """What goes to the next stage, of what `hidden` gave in this one."""
        if not self.config.has_memory:
            return {"x": hidden}
        if not self._stages.layers(self._stage, "decoder"):
            return {"memory" if self._stages.ends(self._stage, "encoder") else "x": hidden}
        return {"x": hidden, "memory": self._memory}

    def relay(self, comm: Any | None) -> None:
        """Talk to the other stages of comm from now on, whenever the model is called; None for no longer."""
        self._relay = comm

    def _run(self, stack: str, function: Any) -> mx.array:
        begins = self._stages.begins(self._stage, stack)
        self.embeddings._handed = None if begins else self._given["x"]
        try:
            return function()
        finally:
            self.embeddings._handed = None

    def _hidden(self, tokens: mx.array, **keywords: Any) -> mx.array:
        if self.config.has_memory and keywords.get("memory") is None:
            self._memory = self.encode(
                tokens, **{name: keywords[name] for name in ("key_lengths", "segments") if name in keywords}
            )
            keywords = {**keywords, "memory": self._memory}
        return super()._hidden(tokens, **keywords)

    def _relayed(self, function: Any, stack: str) -> mx.array:
        """Wait for the stage before, do this stage's work, and hand its result on."""
        relay, stage, plan = self._relay, self._stage, self._stages
        if not plan.begins(stage, stack):
            self._given = {"x": relay.receive(stage - 1, "hidden states")}
        self._relay = None
        try:
            x = function()
        finally:
            self._relay = relay
        if not plan.ends(stage, stack):
            relay.send(x, stage + 1, "hidden states")
        return x

    def _relayed_encode(self, tokens: mx.array, keywords: dict[str, Any]) -> mx.array:
        """The encoder's output, on every stage."""
        plan, stage, relay = self._stages, self._stage, self._relay
        end = next(number for number in range(len(plan.bounds)) if plan.ends(number, "encoder"))
        if plan.layers(stage, "encoder"):
            memory = self._relayed(lambda: self.encode(tokens, **keywords), "encoder")
        if stage != end:
            return relay.receive(end, "memory")
        for other in range(len(plan.bounds)):
            if other != stage:
                relay.send(memory, other, "memory")
        return memory


def split_stages(model: Transformer, plan: StagePlan, stage: int) -> None:
    """Make a whole model the stage of a plan, in place; arrays may be lazy. Raises UsageError for virtual tokens."""
    if model.prompt is not None:
        raise UsageError("virtual tokens have no rule for pipeline parallelism; use data or tensor parallelism")
    for name in ("encoder", "decoder"):
        if not hasattr(model, name):
            continue
        stack, here = getattr(model, name), plan.layers(stage, name)
        stack.layers = [layer if number in here else Absent() for number, layer in enumerate(stack.layers)]
        stack.__class__ = StageStack
        stack._begins, stack._ends = plan.begins(stage, name), plan.ends(stage, name)
        if not stack._ends:
            stack.norm = nn.Identity()
        if not here and "positions" in stack:
            del stack["positions"]
    part = plan.parts_of_embeddings(stage)
    for name in list(model.embeddings.children()):
        if part == "none" or (part == "token" and name != "token"):
            setattr(model.embeddings, name, None)
    model.embeddings.__class__ = StageEmbeddings
    model.embeddings._handed = None
    if not plan.is_last(stage):
        for name in ("head", "pooler"):
            if name in model:
                del model[name]
    model.__class__, model._alone = StageTransformer, False
    model._stages, model._stage, model._relay, model._memory = plan, stage, None, None
    model._given = {}
