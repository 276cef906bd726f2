"""Bottleneck adapters: small two-layer networks after, or beside, the parts of a block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
from mlx import nn

from mlxlm.errors import UsageError
from mlxlm.layers import ParallelBlock, activation
from mlxlm.peft.method import Content, Method, positive
from mlxlm.peft.places import Part, at, bare, in_layers

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


class BottleneckPart(Part):
    """scale * up(act(down(h))): 2 d m + m + d parameters.  parallel: h is the input of what it stands beside, else the
    output of what it follows.
    """

    def __init__(self, dim: int, width: int, act: str, *, scale: float = 1.0, parallel: bool = False):
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        if parallel:
            bound = 1 / math.sqrt(dim)  # kaiming_uniform with a = sqrt(5)
            self.down.weight = mx.random.uniform(-bound, bound, (width, dim))
            self.up.weight = mx.zeros((dim, width))
        else:
            self.down.weight = mx.random.normal((width, dim), scale=0.02)
            self.up.weight = mx.random.normal((dim, width), scale=0.02)
        self.down.bias, self.up.bias = mx.zeros((width,)), mx.zeros((dim,))
        self.scale, self.parallel = scale, parallel
        self._act = activation(act)

    def add(self, x: mx.array, y: mx.array, base: nn.Module | None, weight: float) -> mx.array:
        """See `Part.add`. On a residual sum (base None) what goes in is the sum, and y what others add to it."""
        h = x if self.parallel or base is None else y
        return y + (weight * self.scale) * self.up(self._act(self.down(h))).astype(y.dtype)


@dataclass(frozen=True, kw_only=True)
class Houlsby(Method):
    """Adapters after attention and after the feed-forward layer, before their residual sums (Houlsby et al. 2019,
    arXiv:1902.00751).

    reduction: the width m is dim / reduction, at least 1.  activation: between the two layers.  scale: of the output.
    layers: the last n, numbers, or names such as "decoder.0"; default all.  cross_attention: adapters after a decoder's
    cross-attention too, default False.  Weights begin as N(0, 0.02), so nearly nothing changes at first.
    """

    name: ClassVar[str] = "houlsby"
    parallel: ClassVar[bool] = False
    parts_of_block: ClassVar[tuple[str, ...]] = ("attention", "feed_forward")
    reduction: float = 16.0
    activation: str = "silu"
    scale: float = 1.0
    layers: int | tuple[int | str, ...] | None = None
    cross_attention: bool = False

    def __post_init__(self) -> None:
        positive(reduction=self.reduction)
        activation(self.activation)

    def places(self, model: Transformer) -> dict[str, str]:
        """Paths of the modules (for `Pfeiffer` of the residual sums) that get an adapter: the part of the block that
        each belongs to, "attention", "cross_attention" or "feed_forward", by path.

        Raises UsageError for cross_attention where there is none.
        """
        if self.cross_attention and not model.config.has_memory:
            raise UsageError("cross_attention is for models with an encoder and a decoder; this one has a single stack")
        found = {}
        for block in self.blocks(model):
            module = bare(at(model, block))
            for part in self.parts_of_block:
                found[self.place(block, part, module)] = part
            if self.cross_attention and "cross_attention" in module:
                found[self.place(block, "cross_attention", module)] = "cross_attention"
        return found

    def place(self, block: str, part: str, module: nn.Module) -> str:
        """The path of the adapter for a part of a block.  module: the block itself."""
        return f"{block}.{part}"

    def part(self, dim: int) -> BottleneckPart:
        """A fresh one for features of that width."""
        width = max(1, int(dim // self.reduction))
        return BottleneckPart(dim, width, self.activation, scale=self.scale, parallel=self.parallel)

    def blocks(self, model: Transformer) -> list[str]:
        """Paths of the blocks that get adapters."""
        stacks = (("encoder", model.config.encoder), ("decoder", model.config.decoder))
        paths = [f"{stack}.layers.{i}" for stack, spec in stacks if spec for i, _ in enumerate(spec.layers)]
        return [path for path in paths if in_layers(model, path, self.layers)]

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`."""
        return Content(parts={path: self.part(model.config.dim) for path in self.places(model)})


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Houlsby):
    """One adapter a block, after the feed-forward layer: it reads the normed residual sum and adds to the sum, which is
    then normed (Pfeiffer et al. 2020, arXiv:2005.00247). Without a norm after the sum it reads the sum itself.

    Settings as for `Houlsby`; activation default "relu".
    """

    name: ClassVar[str] = "pfeiffer"
    parts_of_block: ClassVar[tuple[str, ...]] = ("feed_forward",)
    activation: str = "relu"

    def place(self, block: str, part: str, module: nn.Module) -> str:
        """See `Houlsby.place`: the sum that the part is added to; of a block in parallel there is one."""
        return block if isinstance(module, ParallelBlock) else f"{block}.{part}_residual"

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`."""
        return Content(added={path: self.part(model.config.dim) for path in self.places(model)})


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Houlsby):
    """An adapter beside the feed-forward layer, on its input, times a scale (He et al. 2022, arXiv:2110.04366).

    Settings as for `Houlsby`; reduction default 2, activation "relu", scale 4.  `up` begins as 0: nothing changes.
    """

    name: ClassVar[str] = "parallel-adapter"
    parallel: ClassVar[bool] = True
    parts_of_block: ClassVar[tuple[str, ...]] = ("feed_forward",)
    reduction: float = 2.0
    activation: str = "relu"
    scale: float = 4.0
