"""One decoding step in four forms: plain, in compiled pieces, compiled as a whole, and fused.

A step of a small batch is bound by the host: Python builds the graph, MLX encodes each kernel. Compiled pieces take the
first share away and fuse elementwise operations; only the attention between them is built anew, because what it sees
grows with every token (its kernel for few queries wants no mask, so it wants the keys cut to length). Compiled as a
whole, nothing is built, but attention runs over all room of the cache with a mask. Fused is compiled as a whole too,
from kernels for one token (`fused_step`), about half as many; only some decoders have them, and only a single row, so
others take the form that comes next.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxlm import runtime
from mlxlm.errors import UsageError, nearest
from mlxlm.generation.fused_step import FusedLayers, Unserved, is_plain
from mlxlm.kernels.attention import tuning
from mlxlm.layers import (
    Attention,
    Block,
    Cache,
    CacheSpec,
    KeyValueCache,
    ParallelBlock,
    Scope,
    TokenPositions,
    WindowCache,
)

if TYPE_CHECKING:
    from mlxlm.models import Transformer

Compiled = Literal["no", "pieces", "whole", "fused"]


@dataclass(frozen=True, kw_only=True)
class Stepping:
    """How decoding steps run; results are the same.

    joined: projections that read the same input as one product.  compiled: "no", "pieces" (all between attention and
    attention), "whole", or "fused": kernels for one token where the model has them, else whole, or in pieces where the
    cache is no plain one.  ahead: steps launched before a token is read, at least 1.
    """

    joined: bool = True
    compiled: Compiled = "no"
    ahead: int = 1

    def __post_init__(self) -> None:
        if self.compiled not in get_args(Compiled):
            raise UsageError(f"unknown way to compile {self.compiled!r}{nearest(self.compiled, get_args(Compiled))}")
        if self.ahead < 1:
            raise UsageError(f"{self.ahead} steps ahead; at least 1 is launched before a token is read")

    @classmethod
    def parse(cls, text: str) -> Stepping:
        """From "joined=0,compiled=pieces,ahead=4"; what is not named has the default of this machine."""
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {}
        for entry in filter(None, text.split(",")):
            name, _, value = entry.partition("=")
            if name not in known:
                raise UsageError(f"unknown option of decoding steps {name!r}{nearest(name, known)}")
            if name == "compiled":
                given[name] = value
            elif not value.isdecimal():
                raise UsageError(f"{name} of decoding steps is a number, not {value!r}")
            else:
                given[name] = bool(int(value)) if name == "joined" else int(value)
        return replace(_DEFAULTS[runtime.backend()], **given)


# On the CPU compiled kernels start a C++ compiler, about a second each, and gain nothing. On GPUs building the graph of
# a step takes as long as running it (tools/benchmarks/LOG.md), and pieces take half of that away. Fused steps were
# measured on CUDA only; on Metal their kernels were only emulated, so there they are a choice.
_DEFAULTS = {
    "cpu": Stepping(),
    "cuda": Stepping(compiled="fused", ahead=2),
    "metal": Stepping(compiled="pieces", ahead=2),
}


def default_stepping(model: Transformer | None = None) -> Stepping:
    """What the environment variable MLXLM_DECODE says (see `Stepping.parse`), else what was measured here, else usual.

    Measured: by `mlxlm doctor --tune` for models of that size, in one process.  usual: what is best on this kind of
    device.
    """
    choice = os.environ.get("MLXLM_DECODE", "")
    if not choice and model is not None and model._alone:
        measured = tuning.record(runtime.backend()).choices.get(tuning_key(model), "")
        with contextlib.suppress(UsageError):  # else another version wrote it, which knew other forms
            return Stepping.parse(measured)
    try:
        return Stepping.parse(choice)
    except UsageError as error:
        raise UsageError(f"MLXLM_DECODE: {error}") from None


def tuning_key(model: Transformer) -> str:
    """The name under which the best steps of a model of that size are recorded."""
    decoder = model.config.decoder
    layers, width = (0, 0) if decoder is None else (len(decoder.layers), model.config.embeddings.dim)
    table = model.embeddings.token
    kind = f"{table.bits} bits" if hasattr(table, "bits") else str(table.weight.dtype).removeprefix("mlx.core.")
    return f"steps {kind} {layers} layers {width} wide"


Step = Callable[[mx.array, Cache], mx.array]


def make_step(model: Transformer, stepping: Stepping | None = None) -> Step:
    """A function of tokens (B,) and a cache that gives the logits (B, V) of what follows, and fills the cache.

    Compiled steps hold on to the weights that the model has now. They are for models with one stack and no virtual
    tokens, all in this process, in evaluation mode; others take the plain step.
    """
    stepping = default_stepping(model) if stepping is None else stepping
    if stepping.joined and not model.training:
        model.join_projections()
    simple = not model.config.has_memory and model.prompt is None and model._alone
    if stepping.compiled != "no" and simple and not model.training:
        return _compiled_step(model, stepping.compiled)
    return _plain_step(model)


def _plain_step(model: Transformer) -> Step:
    return lambda tokens, cache: model(tokens[:, None], cache=cache)[:, -1]


def _pieces(model: Transformer) -> Step:
    """A step in compiled pieces; a plain one where adapters are around attention, which can't be taken apart then."""
    apart = all(isinstance(block.attention, Attention) for block in model.decoder.layers)
    return PiecewiseStep(model) if apart else _plain_step(model)


def _compiled_step(model: Transformer, compiled: Compiled) -> Step:
    """The compiled step that the model has already, made anew when a weight is another one now, or an adapter that is
    active.
    """
    weights = [array for _, array in tree_flatten(model.parameters())]
    kind = (compiled, [getattr(module, "_active", None) for module in model.modules()])
    held: tuple[Any, list[mx.array], Step] | None = getattr(model, "_compiled_step", None)
    if held is not None and held[0] == kind and _same(held[1], weights):
        return held[2]
    kinds: dict[Compiled, Callable[[Transformer], Step]] = {"pieces": _pieces, "whole": WholeStep, "fused": FusedStep}
    step = kinds[compiled](model)
    model._compiled_step = (kind, weights, step)  # a tuple with an underscore is no parameter to mlx.nn
    return step


def decoding_cache(model: Transformer, spec: CacheSpec | None = None, stepping: Stepping | None = None) -> Cache:
    """An empty cache that fits the form of the steps."""
    stepping = default_stepping(model) if stepping is None else stepping
    if spec is None and (stepping.compiled == "whole" or _keeps_all(model, stepping)):
        spec = CacheSpec(ragged=True)
    return model.make_cache(spec)


def _keeps_all(model: Transformer, stepping: Stepping) -> bool:
    """Whether the steps will be fused ones, for which a window is no reason to forget."""
    if stepping.compiled != "fused" or model.config.has_memory or model.config.decoder is None:
        return False
    step = make_step(model, stepping)
    return isinstance(step, FusedStep) and step.fused is not None


def forget_steps(model: Transformer) -> None:
    """Let go of compiled steps and of the weights that they hold on to, as before an update of the weights."""
    model._compiled_step = None


def _same(one: list[mx.array], other: list[mx.array]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


class PiecewiseStep:
    """A step whose parts between attention and attention are compiled."""

    def __init__(self, model: Transformer):
        self.model = model
        blocks: list[Block | ParallelBlock] = model.decoder.layers
        self._shared = model.decoder.positions if model.config.decoder.positions is not None else None
        self._attentions = [block.attention for block in blocks]

        def begin(tokens: mx.array, place: mx.array) -> tuple[mx.array, ...]:
            scope = Scope(TokenPositions(1, place))
            x = model.decoder.dropout(model.embeddings(tokens[:, None], scope.positions))
            return x, *blocks[0].project(x, scope)

        def between(block: Any, following: Any) -> Callable[..., Any]:
            def piece(x: mx.array, found: mx.array, place: mx.array) -> tuple[mx.array, ...]:
                x = block.finish(x, found)
                return x, *following.project(x, Scope(TokenPositions(1, place)))

            return mx.compile(piece)

        def end(x: mx.array, found: mx.array) -> mx.array:
            x = model.decoder.dropout(model.decoder.norm(blocks[-1].finish(x, found)))
            return model.logits(x[:, -1])

        self._begin, self._end = mx.compile(begin), mx.compile(end)
        self._between = [between(*pair) for pair in pairwise(blocks)]

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        self.model.check_room(cache, 1)
        offset = cache.offset
        place = mx.array(offset, dtype=mx.int32) if isinstance(offset, int) else offset
        scope = Scope(TokenPositions(1, offset), shared=self._shared, slots=cache.slots)
        x, *asked = self._begin(tokens, place)
        for attention, layer, piece in zip(self._attentions, cache, self._between, strict=False):
            x, *asked = piece(x, attention.attend(*asked, scope, layer), place)
        logits = self._end(x, self._attentions[-1].attend(*asked, scope, cache[len(cache) - 1]))
        cache.advance(1)
        return logits


class WholeStep:
    """A step compiled as a whole, over the room that the cache has; built again when that grows.

    forward: makes logits (B, V) of tokens (B,), their place and the cache; default the model.
    """

    def __init__(self, model: Transformer, forward: Callable[[mx.array, mx.array, Cache], mx.array] | None = None):
        self.model = model
        self._forward = forward or (lambda tokens, place, cache: model(tokens[:, None], cache=cache)[:, -1])
        self._compiled: dict[int, Callable[..., Any]] = {}

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        if any(isinstance(layer, WindowCache) or layer.keys is None for layer in cache):
            raise UsageError("a step compiled as a whole needs a cache made with CacheSpec(ragged=True), and a prompt")
        self.model.check_room(cache, 1)
        length, lengths = cache.layers[0].length, cache.lengths
        for layer in cache:
            layer.reserve(length + 1)
        offset = cache.offset
        place = mx.array(offset, dtype=mx.int32) if isinstance(offset, int) else offset
        state = [(layer.keys, layer.values) for layer in cache]
        for layer in cache:
            layer.keys = layer.values = None  # so that nothing but the graph holds the arrays, which it may then reuse
        try:
            logits, state = self._function(cache)(tokens, place, state)
        except BaseException:  # an interrupt too: the cache is then what it was
            for layer, (keys, values) in zip(cache, state, strict=True):
                layer.keys, layer.values = keys, values
            raise
        for layer, (keys, values) in zip(cache, state, strict=True):
            layer.keys, layer.values, layer.length = tuple(keys), tuple(values), length + 1
        cache.place, cache.lengths = None, lengths
        cache.advance(1)
        return logits

    def _function(self, cache: Cache) -> Callable[..., Any]:
        """The compiled step, one for each kind of cache."""
        storage = cache[0].storage
        key = hash(storage)
        if key not in self._compiled:

            def step(tokens: mx.array, place: mx.array, state: list[Any]) -> tuple[mx.array, list[Any]]:
                held = Cache([KeyValueCache(storage) for _ in state])
                for layer, (keys, values) in zip(held, state, strict=True):
                    # The last slot is there, so that no room is made; what is written goes to `place`.
                    layer.keys, layer.values, layer.length = tuple(keys), tuple(values), keys[0].shape[2] - 1
                held.place = place
                logits = self._forward(tokens, place, held)
                return logits, [(list(layer.keys), list(layer.values)) for layer in held]

            self._compiled[key] = mx.compile(step)
        return self._compiled[key]


class FusedStep:
    """A step in kernels for one token (`fused_step`) where the model has them and there is one row; else compiled as a
    whole, or in pieces where the cache is no plain one.

    fused: None for a model that the kernels don't serve; `reason` says why.
    """

    def __init__(self, model: Transformer):
        self._pieces, self._whole = _pieces(model), WholeStep(model)
        self.fused: WholeStep | None = None
        self.reason = ""
        try:
            self.fused = WholeStep(model, FusedLayers(model))
        except Unserved as reason:
            self.reason = str(reason)

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        if not is_plain(cache):
            return self._pieces(tokens, cache)
        fused = self.fused if tokens.shape[0] == 1 else None
        return (fused or self._whole)(tokens, cache)
