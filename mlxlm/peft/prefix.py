"""Keys and values before those of the tokens, in every layer: prefix tuning and P-tuning v2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import mlx.core as mx
from mlx import nn

from mlxlm.errors import UnsupportedModelError, UsageError
from mlxlm.layers import Prefix, VirtualTokens
from mlxlm.layers.virtual import StackName
from mlxlm.peft.method import Content, Method, positive

if TYPE_CHECKING:
    from mlxlm.models import Transformer, TransformerConfig
    from mlxlm.tokenizers import Tokenizer

# One slot holds keys and values of one attention layer: (stack, layer, "own" or "memory").
Place = tuple[StackName, int, Literal["own", "memory"]]


@dataclass(frozen=True)
class Slots:
    """Which part of a prefix each attention layer reads.

    count: slots.  places: slot by place.  heads, head_dim: of keys and values.
    """

    count: int
    places: dict[Place, int]
    heads: int
    head_dim: int

    @property
    def dim(self) -> int:
        """Features of one slot's keys."""
        return self.heads * self.head_dim


def slots_for(config: TransformerConfig, attentions: Literal["all", "decoder"] = "all") -> Slots:
    """One slot for every attention layer of a model.

    attentions: of an encoder-decoder, "all" (encoder, decoder, cross-attention) or "decoder": the self-attention of the
    decoder alone, and in it, as Hugging Face PEFT has it, layer l reads slot 2l modulo the number of layers.
    """
    places: dict[Place, int] = {}
    if config.has_memory and attentions == "decoder":
        count = len(config.decoder.layers)
        places = {("decoder", layer, "own"): 2 * layer % count for layer in range(count)}
    else:
        for stack, spec in (("encoder", config.encoder), ("decoder", config.decoder)):
            for layer, _ in enumerate(spec.layers if spec else ()):
                places["decoder" if stack == "decoder" else "encoder", layer, "own"] = len(places)
        if config.has_memory:
            for layer, _ in enumerate(config.decoder.layers):
                places["decoder", layer, "memory"] = len(places)
        count = len(places)
    stacks = [spec for spec in (config.encoder, config.decoder) if spec is not None]
    shapes = {(layer.attention.num_kv_heads, layer.attention.head_dim) for spec in stacks for layer in spec.layers}
    if len(shapes) > 1:
        raise UnsupportedModelError("prefix tuning needs key/value heads of one number and width in all layers")
    heads, head_dim = shapes.pop()
    return Slots(count, places, heads, head_dim)


class PrefixTokens(VirtualTokens):
    """Keys and values of `length` virtual tokens for each slot.

    weight (length, 2 * slots * dim): slot s has keys at 2s and values at 2s + 1.  With hidden_dim it is
    (length, dim), and two linear layers with a tanh between, `first` and `second`, make the whole of it.
    """

    def __init__(self, length: int, slots: Slots, hidden_dim: int | None = None, weight: mx.array | None = None):
        super().__init__()
        self.length, self.slots = length, slots
        width = 2 * slots.count * slots.dim
        if weight is not None:
            self.weight = weight
        else:
            self.weight = mx.random.normal((length, width if hidden_dim is None else slots.dim), scale=0.5)
        self._projected = hidden_dim is not None
        if hidden_dim is not None:
            self.first = nn.Linear(slots.dim, hidden_dim)
            self.second = nn.Linear(hidden_dim, width)

    def encoded(self) -> mx.array:
        """The whole prefix, (length, 2 * slots * dim)."""
        return self.second(mx.tanh(self.first(self.weight))) if self._projected else self.weight

    def prefixes(self, stack: StackName) -> list[Prefix] | None:
        """See `VirtualTokens.prefixes`."""
        mine = {place: slot for place, slot in self.slots.places.items() if place[0] == stack}
        if not mine:
            return None
        shape = (1, self.length, 2 * self.slots.count, self.slots.heads, self.slots.head_dim)
        whole = self.encoded().reshape(shape).transpose(2, 0, 3, 1, 4)

        def pair(layer: int, kind: Literal["own", "memory"]) -> tuple[mx.array | None, mx.array | None]:
            slot = mine.get((stack, layer, kind))
            return (None, None) if slot is None else (whole[2 * slot], whole[2 * slot + 1])

        layers = 1 + max(layer for _, layer, _ in mine)
        return [Prefix(*pair(layer, "own"), *pair(layer, "memory")) for layer in range(layers)]

    def offset(self, stack: StackName) -> int:
        """See `VirtualTokens.offset`: only a stack that reads a prefix has its tokens shifted."""
        return self.length if any(place[0] == stack for place in self.slots.places) else 0


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Keys and values before those of the tokens, in every layer (Li and Liang 2021, arXiv:2101.00190).

    num_tokens v: default 20.  projection: a small network makes them while they are trained, as in the paper: v d + d h
    + h + (h + 1) 2 n d parameters for n attention layers whose keys have d features; without it 2 n d v.  Default True.
    hidden_dim h: of that network, default 512.  attentions: of an encoder-decoder, see `slots_for`; default "all", as
    in the paper; "decoder" can be written for Hugging Face PEFT.
    """

    name: ClassVar[str] = "prefix"
    num_tokens: int = 20
    projection: bool = True
    hidden_dim: int = 512
    attentions: Literal["all", "decoder"] = "all"

    def __post_init__(self) -> None:
        positive(num_tokens=self.num_tokens, hidden_dim=self.hidden_dim)
        if self.attentions not in ("all", "decoder"):
            raise UsageError(f"attentions is 'all' or 'decoder', not {self.attentions!r}")

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`."""
        slots = slots_for(model.config, self.attentions)
        return Content(prompt=PrefixTokens(self.num_tokens, slots, self.hidden_dim if self.projection else None))


@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """Deep prompts and a task head (Liu et al. 2021, arXiv:2110.07602): a prefix in every layer without the network,
    and the head trained as a whole (`modules_to_save`, by default the head of a classifier).

    Settings as for `PrefixTuning`.
    """

    name: ClassVar[str] = "p-tuning-v2"
    projection: bool = False
    modules_to_save: tuple[str, ...] | None = None  # type: ignore[assignment]

    def content(self, model: Transformer, tokenizer: Tokenizer | None = None) -> Content:
        """See `Method.content`."""
        from dataclasses import replace

        if self.modules_to_save is not None:
            return super().content(model, tokenizer)
        classifier = model.config.head is not None and not model.config.predicts_words
        return replace(self, modules_to_save=("head",) if classifier else ()).content(model, tokenizer)
