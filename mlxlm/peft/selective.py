"""Methods that add nothing and train some of the model's own parameters: all, the biases, the last layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx

from mlxlm.errors import UsageError
from mlxlm.peft.method import Content, Method, positive
from mlxlm.peft.places import base_parameters, layer_of

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


def _chosen(model: Transformer, wanted: Callable[[str], bool]) -> Content:
    """Those of the model's parameters. Raises UsageError for quantized ones, which can't be trained."""
    own = {name: array for name, array in base_parameters(model).items() if wanted(name)}
    quantized = [name for name in own if name.endswith(".scales")]
    if quantized:
        raise UsageError(
            f"{quantized[0].removesuffix('.scales')} is quantized and can't be trained; load with quantized=False, or "
            "use QLoRA"
        )
    return Content(own={name: array for name, array in own.items() if mx.issubdtype(array.dtype, mx.floating)})


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """All parameters are trained: embeddings, blocks, norms and head."""

    name: ClassVar[str] = "full"

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`."""
        return _chosen(model, lambda name: True)


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Only biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199): those of linear layers, norms and head."""

    name: ClassVar[str] = "bitfit"

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`. Raises UsageError for a model that has no biases."""
        content = _chosen(model, lambda name: name.split(".")[-1] == "bias")
        if not content.own:
            raise UsageError("BitFit trains biases, and this model has none; take another method, such as IA3 or LoRA")
        return content


@dataclass(frozen=True, kw_only=True)
class LastLayers(Method):
    """The last blocks, the norm after them and the head are trained (Howard and Ruder 2018, arXiv:1801.06146, where
    more and more of them are). A head that shares the token table leaves it as it is.

    num_layers: blocks of the stack that the head reads, default 2.
    """

    name: ClassVar[str] = "last-layers"
    num_layers: int = 2

    def __post_init__(self) -> None:
        positive(num_layers=self.num_layers)

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`. Raises UsageError for more layers than there are."""
        stack = "decoder" if model.config.decoder is not None else "encoder"
        count = len(model.config.stack.layers)
        if self.num_layers > count:
            raise UsageError(f"the last {self.num_layers} layers of a model with {count} layers")

        def wanted(name: str) -> bool:
            place = layer_of(name)
            if place is None:
                return name.startswith((f"{stack}.norm.", "head.", "pooler."))
            return place[0] == stack and place[1] >= count - self.num_layers

        return _chosen(model, wanted)
