"""Ring attention: rows that are too long for one process, a part of every row in each.

Keys and values go round the ranks; each rank lets its queries attend to the part that it has just now, and puts the
results together by their log-sum-exp, as a tiled kernel does with tiles (Liu, Zaharia and Abbeel 2023,
arXiv:2310.01889).

With partial outputs o_j and log-sum-exps l_j, L = log sum exp(l_j) and w_j = exp(l_j - L): out = sum w_j o_j. So
d out flows to w_j o_j, and - sum(d out * out) to each w_j, with L as a constant: so the backward pass goes round too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxlm.distributed.apart import apart
from mlxlm.distributed.communicator import Comm
from mlxlm.distributed.tensor_parallel import SharedAttention
from mlxlm.errors import UsageError
from mlxlm.kernels import AttentionMask, attention
from mlxlm.layers.alibi import Alibi
from mlxlm.layers.attention import Attention
from mlxlm.models import Transformer

Arrays = dict[str, mx.array]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank's queries see of the keys of one rank.

    mask: with places counted from the first of these keys.  terms: what is added to the scores, `attention`'s keywords.
    """

    mask: AttentionMask
    terms: Arrays


def ring_attention(
    comm: Comm, query: mx.array, key: mx.array, value: mx.array, parts: list[Part | None], **options: Any
) -> mx.array:
    """Attention of this rank's queries (B, H, L, D) to the keys and values (B, Hkv, S, D) of all ranks, (B, H, L, D).

    parts: for the keys of each rank what is seen of them, None for nothing.  options: scale, softcap.
    Differentiable in query, key, value and the parts' terms; every rank must call it, and its gradient, together.
    """
    inputs = {"query": query, "key": key, "value": value}
    for number, part in enumerate(parts):
        if part is not None:
            inputs |= {f"{number}/{name}": array for name, array in part.terms.items()}

    @mx.custom_function
    def run(inputs: Arrays) -> list[mx.array]:
        return _forward(comm, inputs, parts, options)

    @run.vjp
    def run_vjp(inputs: Arrays, cotangents: list[mx.array], outputs: list[mx.array]) -> Arrays:
        return _backward(comm, inputs, parts, options, cotangents[0], *outputs)

    return run(inputs)[0]


def _forward(comm: Comm, inputs: Arrays, parts: list[Part | None], options: dict[str, Any]) -> list[mx.array]:
    """Output in the dtype of the query, and the log-sum-exp over all keys, -inf where a query sees none."""
    query, held = inputs["query"], [inputs["key"], inputs["value"]]
    out = mx.zeros((*query.shape[:3], held[1].shape[3]))
    lse = mx.full(query.shape[:3], -mx.inf)
    for step in range(comm.size):
        number = (comm.index - step) % comm.size
        part = parts[number]
        if part is not None:
            out, lse = apart(_adding(part, options), [out, lse, query, *held, *_terms(inputs, number, part)])
        if step + 1 < comm.size:
            held = comm.rotate(held, "keys and values")
    return [out.astype(query.dtype), lse]


def _adding(part: Part, options: dict[str, Any]) -> Callable[..., list[mx.array]]:
    """A function that puts what is found in a part to what was found before: output and log-sum-exp."""

    def add(
        out: mx.array, lse: mx.array, query: mx.array, key: mx.array, value: mx.array, *terms: mx.array
    ) -> list[mx.array]:
        own, own_lse = _attend(query, key, value, terms, part, options)
        total = mx.logaddexp(lse, own_lse)
        out = out * _share(lse, total)[..., None] + own.astype(mx.float32) * _share(own_lse, total)[..., None]
        return [out, total]

    return add


def _backward(
    comm: Comm,
    inputs: Arrays,
    parts: list[Part | None],
    options: dict[str, Any],
    cotangent: mx.array,
    out: mx.array,
    lse: mx.array,
) -> Arrays:
    """Gradients of the inputs; those of keys and values travel with these until they are home again."""
    query, held = inputs["query"], [inputs["key"], inputs["value"]]
    cotangent = cotangent.astype(mx.float32)
    of_share = -(cotangent * out.astype(mx.float32)).sum(-1)
    gradients = {name: mx.zeros(array.shape) for name, array in inputs.items()}
    travelling = [mx.zeros(array.shape) for array in held]
    for step in range(comm.size):
        number = (comm.index - step) % comm.size
        part = parts[number]
        if part is not None:
            given = [cotangent, of_share, lse, query, *held, *_terms(inputs, number, part)]
            of_query, of_key, of_value, *of_terms = apart(_differentiating(part, options), given)
            gradients["query"] = gradients["query"] + of_query
            travelling = [travelling[0] + of_key, travelling[1] + of_value]
            gradients |= {f"{number}/{name}": array for name, array in zip(part.terms, of_terms, strict=True)}
        if step + 1 < comm.size:
            *held, key_gradient, value_gradient = comm.rotate([*held, *travelling], "keys, values and gradients")
            travelling = [key_gradient, value_gradient]
    gradients["key"], gradients["value"] = comm.rotate(travelling, "gradients of keys and values")
    return {name: array.astype(inputs[name].dtype) for name, array in gradients.items()}


def _differentiating(part: Part, options: dict[str, Any]) -> Callable[..., list[mx.array]]:
    """A function that gives the gradients, float32, of query, key, value and terms through what a part contributes."""

    def differentiate(cotangent: mx.array, of_share: mx.array, lse: mx.array, *given: mx.array) -> list[mx.array]:
        def weighted(query: mx.array, key: mx.array, value: mx.array, *terms: mx.array) -> list[mx.array]:
            own, own_lse = _attend(query, key, value, terms, part, options)
            share = _share(own_lse, lse)
            return [own.astype(mx.float32) * share[..., None], share]

        _, found = mx.vjp(weighted, list(given), [cotangent, of_share])
        return [array.astype(mx.float32) for array in found]

    return differentiate


def _attend(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    terms: Sequence[mx.array],
    part: Part,
    options: dict[str, Any],
) -> tuple[mx.array, mx.array]:
    """What a part gives by itself, and its log-sum-exp: -inf where a query sees none of its keys."""
    named = dict(zip(part.terms, terms, strict=True))
    own, lse = attention(query, key, value, mask=part.mask, return_lse=True, **named, **options)
    return own, mx.where(lse == mx.inf, -mx.inf, lse)  # +inf is how the kernel says: no key


def _share(own: mx.array, total: mx.array) -> mx.array:
    """exp(own - total), 0 where own is -inf."""
    return mx.where(own == -mx.inf, 0.0, mx.exp(own - mx.where(total == -mx.inf, 0.0, total)))


def _terms(inputs: Arrays, number: int, part: Part) -> list[mx.array]:
    return [inputs[f"{number}/{name}"] for name in part.terms]


class _Ring:
    """Attention of a part of every row to all of it."""

    def attend(self, query: mx.array, key: mx.array, value: mx.array, scope: Any, cache: Any = None) -> mx.array:
        """See `Attention.attend`."""
        if self._whole_rows:
            return super().attend(query, key, value, scope, cache)
        comm, length = self._ring, key.shape[2]
        if cache is not None or scope.prefix is not None or scope.virtual:
            raise UsageError("rows shared by processes go with no cache and no virtual tokens: they are for training")
        own, segments = self.spec, scope.mask.key_segments
        every = [None] * comm.size if segments is None else list(comm.stack(segments, "document numbers"))
        parts: list[Part | None] = []
        for number in range(comm.size):
            if own.causal and number > comm.index and scope.mask.prefix_lengths is None:
                parts.append(None)
                continue
            offset = (comm.index - number) * length
            mask = replace(
                _moved(scope.mask, number * length, length), causal=own.causal, window=own.window, query_offset=offset,
                key_segments=every[number],
            )  # fmt: skip
            terms = {} if scope.shared is None else scope.shared.score_terms(length, length, offset)
            parts.append(Part(mask=mask, terms={**terms, **self.positions.score_terms(length, length, offset)}))
        _evaluate_masks(parts)
        self._refuse_dropout()
        return ring_attention(comm, query, key, value, parts, scale=self.scale, softcap=own.softcap)

    def _attend_to_memory(self, x: mx.array, scope: Any, cache: Any, memory: mx.array) -> mx.array:
        if self._whole_rows:
            return super()._attend_to_memory(x, scope, cache, memory)
        self._refuse_dropout()
        query = self.query_norm(self._heads(self.query(x)))
        key, value = self._keys_and_values(memory)
        length = key.shape[2]
        parts: list[Part | None] = [
            Part(mask=_moved(scope.memory_mask, number * length, length), terms={}) for number in range(self._ring.size)
        ]
        _evaluate_masks(parts)
        options = {"scale": self.scale, "softcap": self.spec.softcap}
        return ring_attention(self._ring, query, key, value, parts, **options)

    def _refuse_dropout(self) -> None:
        if self.training and self.spec.dropout > 0:
            raise UsageError("rows shared by processes go with no attention dropout; set it to 0 in the model's config")


class RingAttention(_Ring, Attention):
    """See `_Ring`."""


class SharedRingAttention(_Ring, SharedAttention):
    """See `_Ring`; its heads are shared too."""


_KINDS = {Attention: RingAttention, SharedAttention: SharedRingAttention}


def share_rows(model: Transformer, comm: Comm) -> None:
    """Let a model work on this rank's part of every row, in place. Raises UsageError for what has no rule for it."""
    if comm.size == 1:
        return
    if not model.config.predicts_words:
        raise UsageError("sp is for models that predict words: a head for labels looks at whole rows")
    if model.prompt is not None:
        raise UsageError("virtual tokens have no rule for sequence parallelism")
    model._parts = (comm.index, comm.size)
    for module in model.modules():
        if isinstance(module, Alibi) and module.spec.rounded:
            raise UsageError("rounded linear biases depend on the whole row: no rule for sequence parallelism")
        if type(module) in _KINDS:
            module.__class__ = _KINDS[type(module)]
            module._ring, module._whole_rows = comm, False


def take_whole_rows(model: Transformer, wanted: bool) -> None:
    """Let a model that shares rows work on whole ones, each process by itself, as generation needs it; or no longer."""
    comm = next(module._ring for module in model.modules() if isinstance(module, _Ring))
    model._parts = (0, 1) if wanted else (comm.index, comm.size)
    for module in model.modules():
        if isinstance(module, _Ring):
            module._whole_rows = wanted


def _moved(mask: AttentionMask, start: int, length: int) -> AttentionMask:
    """A mask of whole rows as it is for the keys from `start` on, `length` of them."""

    def inside(lengths: mx.array | None) -> mx.array | None:
        return None if lengths is None else mx.clip(lengths - start, 0, length)

    return replace(mask, key_lengths=inside(mask.key_lengths), prefix_lengths=inside(mask.prefix_lengths))


def _evaluate_masks(parts: list[Part | None]) -> None:
    """Masks are used in another thread, see `apart`, which can't build on what is yet to be computed here."""
    names = ("key_lengths", "prefix_lengths", "query_segments", "key_segments")
    arrays = [getattr(part.mask, name) for part in parts if part is not None for name in names]
    mx.eval([array for array in arrays if array is not None])
