"""IA3: activations are rescaled, feature by feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
from mlx import nn

from mlxlm.peft.method import Content, Method
from mlxlm.peft.places import Part, at, bare, input_dim, matching

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


class ScalePart(Part):
    """Output, or input, times a vector.  scale (out,) or, with on_input, (in,)."""

    def __init__(self, scale: mx.array, on_input: bool):
        super().__init__()
        self.scale, self.on_input = scale, on_input

    def _factor(self, weight: float, dtype: mx.Dtype) -> mx.array:
        return (self.scale if weight == 1 else 1 + weight * (self.scale - 1)).astype(dtype)

    def prepare(self, x: mx.array, weight: float) -> mx.array:
        """See `Part.prepare`."""
        return x * self._factor(weight, x.dtype) if self.on_input else x

    def add(self, x: mx.array, y: mx.array, base: nn.Module | None, weight: float) -> mx.array:
        """See `Part.add`."""
        return y if self.on_input else y * self._factor(weight, y.dtype)

    def merged(self, whole: mx.array, weight: float) -> mx.array:
        """The weight (out, in) with this part in it."""
        factor = self._factor(weight, whole.dtype)
        return whole * (factor if self.on_input else factor[:, None])

    def merged_bias(self, bias: mx.array, weight: float) -> mx.array:
        """The bias (out,) with this part in it."""
        return bias if self.on_input else bias * self._factor(weight, bias.dtype)


@dataclass(frozen=True, kw_only=True)
class Ia3(Method):
    """Keys, values and the hidden features of the feed-forward layer times learned vectors, which begin as 1
    (Liu et al. 2022, arXiv:2205.05638). Parameters: the outputs of `targets` and the inputs of `feed_forward`.

    targets: linear layers whose output is scaled, default keys and values of all attentions.  feed_forward: linear
    layers whose input is scaled, default the last one of each feed-forward layer.  layers: the last n, or numbers;
    default all.
    """

    name: ClassVar[str] = "ia3"
    targets: tuple[str, ...] = ("key", "value")
    feed_forward: tuple[str, ...] = ("feed_forward.down",)
    layers: int | tuple[int, ...] | None = None

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`."""
        content = Content()
        for path in matching(model, self.targets, layers=self.layers) if self.targets else ():
            content.parts[path] = ScalePart(mx.ones((bare(at(model, path)).weight.shape[0],)), False)
        for path in matching(model, self.feed_forward, layers=self.layers) if self.feed_forward else ():
            content.parts[path] = ScalePart(mx.ones((input_dim(bare(at(model, path))),)), True)
        return content
