"""Low-rank adaptation: LoRA, DoRA, and both on quantized weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
from mlx import nn

from mlxlm.errors import UsageError
from mlxlm.peft.method import Content, Method, positive, share
from mlxlm.peft.places import EMBEDDING, LINEAR, Part, at, bare, input_dim, matching

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


def dense_weight(module: nn.Module) -> mx.array:
    """The weight of a linear layer or a table, dequantized where it is quantized."""
    if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return module.weight
    biases = module.get("biases")
    return mx.dequantize(module.weight, module.scales, biases, module.group_size, module.bits, module.mode)


@cache
def _nothing(rank: int, dtype: mx.Dtype) -> mx.array:
    """Zeros (rank,), to be added to a product."""
    zeros = mx.zeros((rank,), dtype=dtype)
    mx.eval(zeros)
    return zeros


def _inner(x: mx.array, matrix: mx.array, factor: float) -> mx.array:
    """factor * x matrix, (..., rank), in one operation: of products only `addmm` takes a factor."""
    return mx.addmm(_nothing(matrix.shape[1], x.dtype), x, matrix, alpha=factor)


def add_low_rank(
    x: mx.array, y: mx.array | None, lora_a: mx.array, lora_b: mx.array, factor: float, base: nn.Linear | None = None
) -> mx.array:
    """y + factor * x A^T B^T, (..., out) of x (..., in), y (..., out), A (rank, in) and B (out, rank) in one dtype.

    base: instead of y, a linear layer that makes it of x and whose own weights learn nothing.

    For training, whose steps have hundreds of adapters and are as fast as the operations of one are few: two, and four
    for its gradients, with the factor inside. Nothing in a backward pass waits for the gradients of weights; put off to
    its end, they would keep what they are made of until then, of every layer three arrays of the feed-forward's width.
    So here all else waits for them.
    """

    def of_low_rank(x: mx.array, lora_a: mx.array, lora_b: mx.array, cotangent: mx.array) -> tuple[Any, ...]:
        """Gradients of x A^T and of y, and of A and B."""
        # The first is not kept, but made again; `mx.compile` sees that it was, unless all of it is computed again.
        inner, of_inner = _inner(x, lora_a.T, factor), _inner(cotangent, lora_b, factor)
        of_weights = [of_inner.T @ x, cotangent.T @ inner]
        return *mx.depends([of_inner, cotangent], of_weights), of_weights

    @mx.custom_function
    def added(x: mx.array, y: mx.array, lora_a: mx.array, lora_b: mx.array) -> mx.array:
        return mx.addmm(y, _inner(x, lora_a.T, factor), lora_b.T)

    @added.vjp
    def added_vjp(arrays: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> Any:
        x, _, lora_a, lora_b = arrays
        of_inner, of_y, of_weights = of_low_rank(x, lora_a, lora_b, cotangent)
        return of_inner @ lora_a, of_y, *of_weights

    # The one that it has now: layers that processes share have it only while they run.
    weight = None if base is None else base.weight

    @mx.custom_function
    def linear(x: mx.array, lora_a: mx.array, lora_b: mx.array) -> mx.array:
        return mx.addmm(base(x), _inner(x, lora_a.T, factor), lora_b.T)

    @linear.vjp
    def linear_vjp(arrays: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> Any:
        of_inner, of_y, of_weights = of_low_rank(*arrays, cotangent)
        return mx.addmm(of_y @ weight, of_inner, arrays[1]), *of_weights

    rows = x.flatten(0, -2)
    found = linear(rows, lora_a, lora_b) if y is None else added(rows, y.flatten(0, -2), lora_a, lora_b)
    return found.reshape(*x.shape[:-1], -1)


class LoraPart(Part):
    """y + scale * B A dropout(x), for a linear layer (Hu et al. 2021, arXiv:2106.09685).

    lora_a (rank, in), lora_b (out, rank).  magnitude (out,): makes it DoRA (Liu et al. 2024, arXiv:2402.09353), where
    each row of W + scale * B A is rescaled to that length; the length that it has is a constant to gradients.
    The products run in the dtype of the output, whatever that of the parameters.
    """

    def __init__(
        self, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0, magnitude: mx.array | None = None
    ):
        super().__init__()
        self.lora_a, self.lora_b, self.scale = lora_a, lora_b, scale
        self.dropout = nn.Dropout(dropout)
        if magnitude is not None:
            self.magnitude = magnitude

    def whole(self, x: mx.array, base: nn.Module, weight: float) -> mx.array | None:
        """See `Part.whole`."""
        frozen = type(base) is nn.Linear and not base.trainable_parameters() and base.weight.dtype == x.dtype
        if "magnitude" in self or not self.training or self.dropout._p_1 < 1 or not frozen:
            return None
        return add_low_rank(
            x, None, self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype), self.scale * weight, base
        )

    def add(self, x: mx.array, y: mx.array, base: nn.Module | None, weight: float) -> mx.array:
        """See `Part.add`."""
        x = self.dropout(x)
        if "magnitude" not in self:
            x, lora_a, lora_b = (array.astype(y.dtype) for array in (x, self.lora_a, self.lora_b))
            if self.training:
                return add_low_rank(x, y, lora_a, lora_b, self.scale * weight)
            return mx.addmm(y, _inner(x, lora_a.T, self.scale * weight), lora_b.T)
        low = x @ self.lora_a.T.astype(x.dtype)
        change = low @ (self.scale * self.lora_b).T.astype(x.dtype)
        row = (self.magnitude / self._norm(base)).astype(y.dtype)
        plain = base(x) - base.bias if "bias" in base else base(x)
        change = (row - 1) * plain + row * change
        return y + (change if weight == 1 else weight * change).astype(y.dtype)

    def _norm(self, base: nn.Module | None) -> mx.array:
        whole = dense_weight(base).astype(mx.float32) + self.delta()
        return mx.stop_gradient(mx.linalg.norm(whole, axis=1))

    def delta(self) -> mx.array:
        """scale * B A, (out, in) float32."""
        return self.scale * (self.lora_b.astype(mx.float32) @ self.lora_a.astype(mx.float32))

    def merged(self, whole: mx.array, weight: float) -> mx.array:
        """The weight (out, in) with this part in it, float32."""
        changed = whole + self.delta()
        if "magnitude" in self:
            changed = changed * (self.magnitude / mx.linalg.norm(changed, axis=1))[:, None]
        return whole + weight * (changed - whole)


class LoraEmbeddingPart(Part):
    """Rows of a table plus scale * B A[:, token].  lora_a (rank, rows), lora_b (dim, rank).

    magnitude (dim,): makes it DoRA, where each column of the table, as long as the vocabulary, is rescaled to that
    length, as Hugging Face PEFT has it; the length that it has is a constant to gradients.
    """

    def __init__(self, lora_a: mx.array, lora_b: mx.array, scale: float, magnitude: mx.array | None = None):
        super().__init__()
        self.lora_a, self.lora_b, self.scale = lora_a, lora_b, scale
        if magnitude is not None:
            self.magnitude = magnitude

    def add(self, x: mx.array, y: mx.array, base: nn.Module | None, weight: float) -> mx.array:
        """See `Part.add`; x holds token ids."""
        change = self.scale * (self.lora_a.T[x] @ self.lora_b.T)
        if "magnitude" in self:
            length = mx.linalg.norm(dense_weight(base).astype(mx.float32) + self.delta(), axis=0)
            factor = self.magnitude / mx.stop_gradient(length)
            change = (factor - 1) * y.astype(mx.float32) + factor * change
        return y + (weight * change).astype(y.dtype)

    def delta(self) -> mx.array:
        """scale * (B A) transposed, (rows, dim) float32."""
        return self.scale * (self.lora_b.astype(mx.float32) @ self.lora_a.astype(mx.float32)).T

    def merged(self, whole: mx.array, weight: float) -> mx.array:
        """The table (rows, dim) with this part in it, float32."""
        changed = whole + self.delta()
        if "magnitude" in self:
            changed = changed * (self.magnitude / mx.linalg.norm(changed, axis=0))
        return whole + weight * (changed - whole)


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): rank * (in + out) parameters a linear layer.

    rank: default 8.  alpha: the change is multiplied by alpha / rank, default 16.  dropout: of the input of the change.
    rank_stabilized: by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732), default False.
    targets: canonical or hub names of linear layers or the token table, their ends, regular expressions or
    "all-linear"; default the paper's query and value projections.  layers: the last n, or numbers; default all.
    """

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilized: bool = False
    targets: tuple[str, ...] = ("query", "value")
    layers: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        positive(rank=self.rank, alpha=self.alpha)
        share(dropout=self.dropout)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`. A is drawn as a linear layer's weight is, B is 0: nothing changes at first."""
        content = Content()
        tables = [target for target in self.targets if target.split(".")[-1] in _table_names(model)]
        if tables:
            # A table is in no layer, so the choice of layers doesn't concern it.
            for path in matching(model, tables, kinds=EMBEDDING):
                content.parts[path] = self._table(bare(at(model, path)))
        rest = [target for target in self.targets if target not in tables]
        if rest:
            for path in matching(model, rest, kinds=LINEAR, layers=self.layers):
                content.parts[path] = self._linear(bare(at(model, path)))
        return content

    def _linear(self, base: nn.Module) -> LoraPart:
        bound = 1 / math.sqrt(input_dim(base))  # kaiming_uniform with a = sqrt(5)
        lora_a = mx.random.uniform(-bound, bound, (self.rank, input_dim(base)))
        return LoraPart(lora_a, mx.zeros((base.weight.shape[0], self.rank)), self.scale, self.dropout)

    def _table(self, base: nn.Module) -> LoraEmbeddingPart:
        rows, dim = dense_weight(base).shape
        return LoraEmbeddingPart(mx.zeros((self.rank, rows)), mx.random.normal((dim, self.rank)), self.scale)


def _table_names(model: Transformer) -> set[str]:
    """The last parts of the names of the token table."""
    from mlxlm.peft.places import hub_path, rules_of

    hub = hub_path(rules_of(model), "embeddings.token")
    return {"token", *([hub.split(".")[-1]] if hub else [])}


@dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353): LoRA changes the direction of each row
    of a weight, a magnitude of its own the length; `out` more parameters a layer. Of the token table it is the columns
    that have one, dim more parameters. Settings as for `Lora`.
    """

    name: ClassVar[str] = "dora"

    def _linear(self, base: nn.Module) -> LoraPart:
        part = super()._linear(base)
        part.magnitude = mx.linalg.norm(dense_weight(base).astype(mx.float32), axis=1)
        return part

    def _table(self, base: nn.Module) -> LoraEmbeddingPart:
        part = super()._table(base)
        part.magnitude = mx.linalg.norm(dense_weight(base).astype(mx.float32), axis=0)
        return part


@dataclass(frozen=True, kw_only=True)
class Qlora(Lora):
    """LoRA on quantized weights, which stay as they are (Dettmers et al. 2023, arXiv:2305.14314).

    Settings as for `Lora`; targets default to every linear layer, as in the paper. The model must have been loaded
    with its weights quantized (`quantized=True`).
    """

    name: ClassVar[str] = "qlora"
    targets: tuple[str, ...] = ("all-linear",)

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`. Raises UsageError when none of the targets is quantized."""
        content = super().build(model, tokenizer)
        if not any(hasattr(bare(at(model, path)), "bits") for path in content.parts):
            raise UsageError(
                "QLoRA needs quantized weights, and none of the targets has any: load a quantized checkpoint with "
                "quantized=True, or use LoRA"
            )
        return content
