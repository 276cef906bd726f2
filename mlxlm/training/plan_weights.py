"""What a memory plan needs to know of a model's weights: what is frozen, what is trained, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxlm.models import Transformer, TransformerConfig

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
# Float32 arrays of the optimizer's state for each trained one.
STATES = {"adamw": 2, "lion": 1, "sgd": 1, "muon": 1, "adafactor": 0}
_TABLES = ("embeddings.", "positions.", "head.", "pooler.")


@dataclass(frozen=True)
class Weights:
    """The weights of a model in a training step.

    floats: frozen floating-point numbers, which the step holds in its dtype.  packed: bytes of quantized ones with
    their scales.  shapes: of the trained ones, by name.  virtual: of each stack with virtual tokens how many stand
    before its rows, and how many keys before those of each layer's self-attention.
    """

    floats: int
    packed: int
    shapes: Mapping[str, tuple[int, ...]]
    virtual: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return sum(map(prod, self.shapes.values()))

    @property
    def largest(self) -> int:
        """Numbers of the largest array that is trained."""
        return max(map(prod, self.shapes.values()), default=0)

    def joined(self, most: int) -> int:
        """Numbers in trained arrays of at most `most`, whose gradients are joined for their norm."""
        return sum(size for size in map(prod, self.shapes.values()) if size <= most)

    def under(self, path: str) -> dict[str, tuple[int, ...]]:
        """Shapes of what is trained in a module and in those below it, by name from there on."""
        return self._by_path.get(path, {})

    @cached_property
    def _by_path(self) -> dict[str, dict[str, tuple[int, ...]]]:
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.shapes.items():
            for place, character in enumerate(name):
                if character == ".":
                    found.setdefault(name[:place], {})[name[place + 1 :]] = shape
        return found

    def feeds_product(self, path: str) -> bool:
        """Whether the gradients need the input of the linear layer at a path: its matrix or one beside it learns."""
        return any(len(shape) == 2 and not name.endswith("lora_b") for name, shape in self.under(path).items())

    def feeds_own_products(self, path: str) -> bool:
        """Whether matrices of a block itself are trained, not only those of adapters in it."""
        return any(len(shape) == 2 and ".adapters." not in name for name, shape in self.under(path).items())

    def states(self, optimizer: str) -> int:
        """Numbers of an optimizer's state."""
        if optimizer == "muon":  # AdamW for what is no matrix of a layer
            return sum(
                prod(shape) * (1 if len(shape) == 2 and not name.startswith(_TABLES) else 2)
                for name, shape in self.shapes.items()
            )
        return self.trained * STATES[optimizer]


def weights_of(model: Transformer | TransformerConfig) -> Weights:
    """The weights of a model as it stands, its adapters included; of a configuration as if all of them were trained.

    MLX computes nothing before it must, so a model that was only built takes no memory for this.
    """
    with mx.stream(mx.cpu):
        if isinstance(model, TransformerConfig):
            model = Transformer(model)
        trained = {name: tuple(array.shape) for name, array in tree_flatten(model.trainable_parameters())}
        floats, packed = 0, 0
        for name, array in tree_flatten(model.parameters()):
            if name in trained:
                continue
            if mx.issubdtype(array.dtype, mx.floating) and name.rpartition(".")[2] not in ("scales", "biases"):
                floats += array.size
            else:
                packed += array.nbytes
        return Weights(floats, packed, trained, _virtual(model))


def _virtual(model: Transformer) -> dict[str, tuple[int, int]]:
    found = {}
    for stack in ("encoder", "decoder") if model.prompt is not None else ():
        vectors, prefixes = model.prompt.vectors(stack), model.prompt.prefixes(stack) or ()
        keys = [prefix.key.shape[2] for prefix in prefixes if prefix.key is not None]
        found[stack] = (0 if vectors is None else vectors.shape[0], max(keys, default=0))
    return found
