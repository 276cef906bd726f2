"""The tensor-parallel plan: who holds which part of which parameter, by canonical names, the same for every family.

| parameter | kept by a rank |
|---|---|
| query, gate, up | rows: outputs, whole heads of the query |
| key, value | rows, whole heads; fewer heads than ranks are copied to several ranks each |
| output, down | columns: inputs; the bias is whole and added by the first rank |
| token table, output of a language-model head and its bias | rows: words |
| relative positions' table | columns: heads |
| everything else | whole |

Shoeybi et al. 2019, arXiv:1909.08053 (Megatron-LM), section 3. Quantized weights are cut as float ones are, their
scales and biases along with them; adapters as the layer that they change: low-rank ones on the side where it is cut,
rescaling vectors with its outputs or inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx

from mlxlm.distributed.communicator import Comm
from mlxlm.distributed.mesh import tensor_problem
from mlxlm.distributed.pieces import Piece, share
from mlxlm.errors import UsageError
from mlxlm.models import TransformerConfig

_ATTENTION = r"(?P<attention>attention|cross_attention)"
COLUMN = re.compile(rf"(^|\.)({_ATTENTION}\.query|feed_forward\.(gate|up))$")
KEY_VALUE = re.compile(rf"(^|\.){_ATTENTION}\.(key|value)$")
ROW = re.compile(rf"(^|\.)({_ATTENTION}\.output|feed_forward\.down)$")
TABLE = "embeddings.token"
WORDS = ("head.output", "head")  # the head itself holds a bias at most
HEAD_TABLE = re.compile(r"(^|\.)positions$")
HEAD_NORM = re.compile(r"(^|\.)(query_norm|key_norm)$")
_ADAPTER = re.compile(r"\.adapters\.[\w-]+\.")


@dataclass(frozen=True)
class TensorPlan:
    """The parts of rank `index` of `ranks` that share the matrices of a model."""

    config: TransformerConfig
    ranks: int
    index: int

    def __post_init__(self) -> None:
        problem = tensor_problem(self.config, self.ranks)
        if problem is not None:
            raise UsageError(f"tp={self.ranks}: {problem}")

    def piece(self, name: str, shape: tuple[int, ...]) -> Piece:
        """The part of a parameter, given by its canonical name and whole shape, that this rank holds.

        Raises UsageError for one that can't be cut: the inputs of a quantized layer whose groups don't divide, or an
        adapter of a kind that has no rule.
        """
        whole = Piece.whole(shape)
        if self.ranks == 1:
            return whole
        path, kind, adapter = _parts(name)
        of_words = (path == "head.output" and self.config.predicts_words) or (path == TABLE and kind == "magnitude")
        if adapter and of_words:
            raise UsageError(
                f"{name}: an adapter of a matrix whose rows are words has no rule for tensor parallelism; leave it out "
                "of the targets, or use data parallelism alone"
            )
        # A head for labels has an output too, but that stays whole.
        if (path == TABLE or (path in WORDS and self.config.predicts_words)) and not adapter:
            return whole.within(0, *share(shape[0], self.ranks, self.index))
        if HEAD_TABLE.search(path):
            return whole.within(1, *share(shape[1], self.ranks, self.index))
        if not (COLUMN.search(path) or KEY_VALUE.search(path) or ROW.search(path)):
            return whole
        axis = self._axis(path, kind, adapter, name)
        if axis is None:
            return whole
        return whole.within(axis, *self._range(path, shape[axis], name))

    def summed(self, name: str) -> bool:
        """Whether ranks each have a part of the gradient of a parameter, which must be added up over them."""
        if self.ranks == 1:
            return False
        path, kind, adapter = _parts(name)
        if HEAD_NORM.search(path):
            return True
        if KEY_VALUE.search(path) and self._copies(path) and not adapter:
            return True
        if adapter:
            column = COLUMN.search(path) or KEY_VALUE.search(path)
            if kind in ("lora_b", "magnitude", "scale") and KEY_VALUE.search(path) and self._copies(path):
                return True
            return bool((column and kind == "lora_a") or (ROW.search(path) and kind == "lora_b"))
        return bool(ROW.search(path)) and kind == "bias"

    def add_up(self, name: str, piece: Piece, gradient: mx.array, comm: Comm) -> mx.array:
        """The gradient of a part, with what the other ranks that hold it have of it."""
        if not self.summed(name):
            return gradient
        return piece.cut(comm.sum(piece.paste(gradient), f"gradient of {name}"))

    def _axis(self, path: str, kind: str, adapter: bool, name: str) -> int | None:
        """Along which axis a parameter of a shared layer is cut, None for not at all."""
        row = bool(ROW.search(path))
        if not adapter:
            return (None if kind == "bias" else 1) if row else 0
        if kind == "lora_a":
            return 1 if row else None
        if kind == "lora_b":
            return None if row else 0
        if kind == "scale" or (kind == "magnitude" and not row):
            return 0
        raise UsageError(
            f"{name}: adapters of this kind have no rule for tensor parallelism; use LoRA, IA3 (DoRA on query, key, "
            "value, gate and up), or data parallelism alone"
        )

    def _range(self, path: str, total: int, name: str) -> tuple[int, int]:
        if KEY_VALUE.search(path):
            heads = self._kv_heads(path)
            each = total // heads
            if heads < self.ranks:
                head = self.index * heads // self.ranks
                return head * each, (head + 1) * each
            return self.index * heads // self.ranks * each, (self.index + 1) * heads // self.ranks * each
        if total % self.ranks:
            raise UsageError(
                f"{name} has {total} words or groups of inputs, which {self.ranks} ranks can't share evenly: quantize "
                "with a smaller group size, or use another tp"
            )
        return self.index * total // self.ranks, (self.index + 1) * total // self.ranks

    def _copies(self, path: str) -> bool:
        return self._kv_heads(path) < self.ranks

    def _kv_heads(self, path: str) -> int:
        stack, _, number, part, *_ = path.split(".")
        return getattr(getattr(self.config, stack).layers[int(number)], part).num_kv_heads


def _parts(name: str) -> tuple[str, str, bool]:
    """The path of the module of a parameter, the parameter's own name, and whether it is an adapter's."""
    path, _, kind = name.rpartition(".")
    adapter = _ADAPTER.search(name)
    if adapter is not None:
        path = name[: adapter.start()]
    return ".".join(step for step in path.split(".") if step != "base"), kind, adapter is not None
