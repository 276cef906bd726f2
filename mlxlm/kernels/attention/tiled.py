"""Attention in linear memory from plain MLX operations: blocks of query rows against all keys they can see.

A block of rows sees its whole key range at once, so no running softmax is needed; the backward pass recomputes each
block from the saved log-sum-exp. MLX evaluates lazily and would keep many blocks alive: every array that a block reads
is made to depend on the results of the block before (`mx.depends`), so that they run one after the other.

Shapes: B batch, H query heads, K key/value heads, G = H / K, R rows of a block, S keys of a block, D and E head widths.
Arrays travel in dictionaries by name, so that gradients come back under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from mlxlm import runtime
from mlxlm.kernels.attention.blocks import SCORES_ALIVE, HeadGroup, head_groups
from mlxlm.kernels.attention.device import device_profile
from mlxlm.kernels.attention.dropout import keep_mask
from mlxlm.kernels.attention.launches import Range
from mlxlm.kernels.attention.mask import AttentionMask
from mlxlm.kernels.attention.problem import AttentionProblem, describe
from mlxlm.kernels.exponential import exp

Arrays = dict[str, mx.array]

_FORWARD_SCORES = 3  # arrays of the size of a block's scores that exist at once in the forward pass
_MASK_ARRAYS = ("query_offset", "prefix_lengths", "key_lengths", "query_segments", "key_segments")


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    *,
    scale: float,
    mask: AttentionMask,
    alibi_slopes: mx.array | None = None,
    relative_bias: mx.array | None = None,
    bias: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    dropout: float = 0.0,
    dropout_key: mx.array | None = None,
    return_lse: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention with the arguments and results of the reference; memory linear in Lq and Lk, forward and backward."""
    given = {
        "query": query, "key": key, "value": value, "alibi_slopes": alibi_slopes, "relative_bias": relative_bias,
        "bias": bias, "sinks": sinks,
    }  # fmt: skip
    inputs = {name: array for name, array in given.items() if array is not None}
    problem = describe(
        query, key, value, mask, alibi_slopes=alibi_slopes, relative_bias=relative_bias, bias=bias, softcap=softcap,
        sinks=sinks, dropout=dropout,
    )  # fmt: skip
    device = device_profile(runtime.backend())
    tiles = _Tiles(
        scale=scale,
        mask=mask,
        softcap=softcap,
        dropout=dropout,
        dropout_key=dropout_key,
        # MLX's CPU matrix products are about ten times slower in 16 bits; elsewhere they run in the dtype of the query.
        dtype=mx.float32 if device.kind == "cpu" else query.dtype,
        on_cpu=device.kind == "cpu",
        problem=problem,
        forward_groups=head_groups(problem, device, _FORWARD_SCORES),
        backward_groups=head_groups(problem, device, SCORES_ALIVE),
    )

    @mx.custom_function
    def run(inputs: Arrays) -> list[mx.array]:
        return tiles.forward(inputs)

    @run.vjp
    def run_vjp(inputs: Arrays, cotangents: list[mx.array], outputs: list[mx.array]) -> Arrays:
        gradients = tiles.backward(inputs, *cotangents, *outputs)
        return {name: gradients[name].astype(array.dtype) for name, array in inputs.items()}

    out, lse = run(inputs)
    return (out, lse) if return_lse else out


class _Block(NamedTuple):
    """One block: rows of the batch, query heads, queries and the keys they can see, each [start, stop)."""

    batch: Range
    heads: Range
    rows: Range
    keys: Range


@dataclass(frozen=True, kw_only=True)
class _Tiles:
    """One call: its constants, and the two passes over the blocks."""

    scale: float
    mask: AttentionMask
    softcap: float | None
    dropout: float
    dropout_key: mx.array | None
    dtype: mx.Dtype
    on_cpu: bool
    problem: AttentionProblem
    forward_groups: list[HeadGroup]
    backward_groups: list[HeadGroup]

    def forward(self, inputs: Arrays) -> list[mx.array]:
        """Output (B, H, L, E) and natural log-sum-exp, float32 (B, H, L)."""
        state = self._state(inputs)
        outs, lses = {}, {}
        for group in self.forward_groups:
            out, lse = self._forward_group(self._part(state, group), group)
            outs[group.batch, group.heads], lses[group.batch, group.heads] = out, lse
            state = _after(state, (out, lse))
        return [_assembled(outs), _assembled(lses)]

    def _forward_group(self, state: Arrays, group: HeadGroup) -> tuple[mx.array, mx.array]:
        """Output and log-sum-exp of a group of heads."""
        B, H = state["query"].shape[:2]
        K, E = state["value"].shape[1], state["value"].shape[3]
        dtype = getattr(mx, self.problem.dtype)
        outs, lses = [], []
        for block in self._blocks(group):
            R, width = _size(block.rows), _size(block.keys)
            if width == 0:
                outs.append(mx.zeros((B, H, R, E), dtype=dtype))
                lses.append(mx.full((B, H, R), mx.inf, dtype=mx.float32))
                continue
            score_BHRS, _ = self._scores(state, block)
            weight_BHRS, lse_BHR = self._softmax(score_BHRS, state.get("sinks"))
            if self.dropout > 0.0:
                weight_BHRS = mx.where(self._kept(state, block), weight_BHRS * (1.0 / (1.0 - self.dropout)), 0.0)
            weight_BKgS = weight_BHRS.astype(self.dtype).reshape(B, K, -1, width)
            out_BKgE = weight_BKgS @ state["value"][:, :, slice(*block.keys)]
            outs.append(out_BKgE.reshape(B, H, R, E).astype(dtype))
            lses.append(lse_BHR)
            state = _after(state, (outs[-1], lses[-1]))
        return _joined(outs, 2), _joined(lses, 2)

    def backward(
        self, inputs: Arrays, out_cotangent: mx.array, lse_cotangent: mx.array, out: mx.array, lse: mx.array
    ) -> Arrays:
        """Gradients of all inputs under their names, in float32 or the dtype of the input."""
        state = self._state(inputs) | {"out": out, "lse": lse, "d_out": out_cotangent, "d_lse": lse_cotangent}
        # Else mx.compile finds that the forward pass has computed the first scores already, and keeps them for here.
        state = _after(state, (out_cotangent,))
        sums = {n: mx.zeros(a.shape, dtype=mx.float32) for n, a in inputs.items() if n not in _WHOLE_IN_A_GROUP}
        parts: dict[str, dict[tuple[Range, Range], mx.array]] = {name: {} for name in _WHOLE_IN_A_GROUP}
        for group in self.backward_groups:
            part, sums = self._backward_group(self._part(state, group), sums, group)
            for name, gradient in part.items():
                parts[name][group.batch, group.heads] = gradient.astype(inputs[name].dtype)
            state = _after(state, [*sums.values(), *(parts[name][group.batch, group.heads] for name in parts)])
        return sums | {name: _assembled(gradients) for name, gradients in parts.items()}

    def _backward_group(self, state: Arrays, sums: Arrays, group: HeadGroup) -> tuple[Arrays, Arrays]:
        """Gradients of query, key and value of a group of heads; and the other sums with the group's share added."""
        # d(score) = P * (dP - delta): delta gathers what flows through the normalisation and through the LSE itself.
        # A row that sees no key has LSE +inf, so its P is 0; its LSE is a constant, so its cotangent must not count.
        lse = state["lse"]
        delta = (state["d_out"].astype(mx.float32) * state.pop("out").astype(mx.float32)).sum(-1)
        delta = delta - mx.where(lse == mx.inf, 0.0, state.pop("d_lse").astype(mx.float32))
        state = state | {"delta": delta}
        # Gradients of the group's keys and values are sums over its blocks, as those of the modifiers are over all.
        names = ("key", "value")
        sums = sums | {name: mx.zeros(state[name].shape, dtype=mx.float32) for name in names}
        query_gradients = []
        for block in self._blocks(group):
            if block.keys[0] == block.keys[1]:
                query_gradients.append(mx.zeros_like(state["query"][:, :, slice(*block.rows)]))
                continue
            query_gradient, sums = self._block_gradients(state, sums, block)
            query_gradients.append(query_gradient.astype(self.dtype))
            state = _after(state, (query_gradients[-1], *sums.values()))
        gradients = {"query": _joined(query_gradients, 2)} | {name: sums.pop(name) for name in names}
        gradients["key"] = gradients["key"] * self.scale
        if "sinks" in sums:
            share_H = (mx.exp(state["sinks"][:, None] - lse) * state["delta"]).sum((0, 2))
            sums["sinks"] = _added(sums["sinks"], -share_H, 0, _query_heads(self.problem, group.heads))
        return gradients, sums

    def _block_gradients(self, state: Arrays, sums: Arrays, block: _Block) -> tuple[mx.array, Arrays]:
        """The gradient of the block's queries, and the sums of the others with the block's share added."""
        B, H = state["query"].shape[:2]
        K = state["key"].shape[1]
        rows, keys = slice(*block.rows), slice(*block.keys)
        R, width = _size(block.rows), _size(block.keys)
        key_BKSD, value_BKSE = state["key"][:, :, keys], state["value"][:, :, keys]
        query_BKgD = state["query"][:, :, rows].reshape(B, K, -1, key_BKSD.shape[-1])
        d_out_BKgE = state["d_out"][:, :, rows].astype(self.dtype).reshape(B, K, -1, value_BKSE.shape[-1])

        score_BHRS, capped_BHRS = self._scores(state, block)
        # Rounded at once, for the product and for d_score alike: one array of 16 bits instead of one of 32 too.
        weight_BHRS = exp(score_BHRS - state["lse"][:, :, rows, None]).astype(self.dtype)
        d_weight_BHRS = (d_out_BKgE @ value_BKSE.swapaxes(-1, -2)).reshape(B, H, R, width).astype(mx.float32)
        dropped_BHRS = weight_BHRS
        if self.dropout > 0.0:
            factor = self._kept(state, block) * (1.0 / (1.0 - self.dropout))
            dropped_BHRS, d_weight_BHRS = (weight_BHRS * factor).astype(self.dtype), d_weight_BHRS * factor
        d_score_BHRS = weight_BHRS.astype(mx.float32) * (d_weight_BHRS - state["delta"][:, :, rows, None])

        sums = dict(sums)
        self._add_modifier_gradients(state, sums, d_score_BHRS, block)
        if capped_BHRS is not None:
            d_score_BHRS = d_score_BHRS * (1.0 - capped_BHRS * capped_BHRS)
        d_score_BKgS = d_score_BHRS.astype(self.dtype).reshape(B, K, -1, width)
        dropped_BKgS = dropped_BHRS.reshape(B, K, -1, width)
        sums["key"] = _added(sums["key"], d_score_BKgS.swapaxes(-1, -2) @ query_BKgD, 2, block.keys)
        sums["value"] = _added(sums["value"], dropped_BKgS.swapaxes(-1, -2) @ d_out_BKgE, 2, block.keys)
        d_query_BHRD = (d_score_BKgS @ key_BKSD).reshape(B, H, R, -1)
        if not self._scales_key:
            d_query_BHRD = d_query_BHRD.astype(mx.float32) * self.scale
        return d_query_BHRD, sums

    def _add_modifier_gradients(self, state: Arrays, sums: Arrays, d_score_BHRS: mx.array, block: _Block) -> None:
        """Add the block's share of the gradients of what is added to the scores."""
        if "alibi_slopes" in sums:
            share_H = (d_score_BHRS * self._distance(state, block)).sum((0, 2, 3))
            sums["alibi_slopes"] = _added(sums["alibi_slopes"], -share_H, 0, block.heads)
        if "relative_bias" in sums:
            share_HW = _diagonal_sums(d_score_BHRS.sum(0))
            start = self._diagonals(block)[0]
            where = slice(*block.heads), slice(start, start + share_HW.shape[1])
            sums["relative_bias"] = sums["relative_bias"].at[where].add(share_HW)
        if "bias" in sums:
            sums["bias"] = _added_bias(sums["bias"], d_score_BHRS, block)

    def _scores(self, state: Arrays, block: _Block) -> tuple[mx.array, mx.array | None]:
        """Final scores of a block, float32 (B, H, R, S), low for hidden keys; and tanh(score / softcap) or None."""
        B, H, L, D = state["query"].shape
        K, S = state["key"].shape[1:3]
        rows, keys = block.rows, block.keys
        query_BKgD = state["query"][:, :, slice(*rows)].reshape(B, K, -1, D)
        key_BKSD = state["key"][:, :, slice(*keys)]
        # Reshaped before anything else: elementwise operations fuse with each other, not through a reshape.
        score, capped = (query_BKgD @ key_BKSD.swapaxes(-1, -2)).reshape(B, H, -1, _size(keys)), None
        score = score.astype(mx.float32)
        if not self._scales_key:
            score = score * self.scale
        if self.softcap is not None:
            capped = mx.tanh(score * (1.0 / self.softcap))
            score = capped * self.softcap
        if "alibi_slopes" in state:
            score = score - state["alibi_slopes"][:, None, None] * self._distance(state, block)
        if "relative_bias" in state:
            score = score + _spread_diagonals(state["relative_bias"], self._diagonals(block), rows, keys)
        if "bias" in state:
            # A bias of -inf hides a key as the mask does.
            score = mx.maximum(score + _block_of(state["bias"], rows, keys).astype(mx.float32), self._hidden)
        mask = replace(self.mask, **{name: state[name] for name in _MASK_ARRAYS if name in state})
        indices = state["query_index"][slice(*rows)], state["key_index"][slice(*keys)]
        visible = mask.dense_block(rows, keys, L, S, indices)
        # Adding is ten times faster than selecting on the CPU, and the mask has no head axis.
        return (score if visible is None else score + mx.where(visible, 0.0, self._hidden)), capped

    @property
    def _scales_key(self) -> bool:
        """Whether the key is scaled instead of each score: where that rounds nothing that matters."""
        return self.dtype == mx.float32 or math.frexp(self.scale)[0] == 0.5  # a power of two

    @property
    def _hidden(self) -> float:
        """What is added to the score of a hidden key, so that its weight is exactly 0.

        Finite on GPUs, so that their log-sum-exp never meets inf - inf; infinite on the CPU, where `exp` is slow for
        large finite numbers.
        """
        return -mx.inf if self.on_cpu else -1e30

    def _softmax(self, score_BHRS: mx.array, sinks: mx.array | None) -> tuple[mx.array, mx.array]:
        """Weights (B, H, R, S) and log-sum-exp (B, H, R) of a block; 0 and +inf for a row that sees no key."""
        if not self.on_cpu:
            lse_BHR = mx.logsumexp(score_BHRS, axis=-1)
        else:
            top_BHR1 = score_BHRS.max(-1, keepdims=True)
            top_BHR1 = mx.where(top_BHR1 == -mx.inf, 0.0, top_BHR1)
            score_BHRS = exp(score_BHRS - top_BHR1)
            total_BHR1 = score_BHRS.sum(-1, keepdims=True)
            lse_BHR = (top_BHR1 + mx.log(total_BHR1)).squeeze(-1)
        plain_BHR = lse_BHR
        empty_BHR = lse_BHR < -1e29
        if sinks is not None:
            lse_BHR = mx.logaddexp(lse_BHR, sinks[:, None])
        lse_BHR = mx.where(empty_BHR, mx.inf, lse_BHR)
        if not self.on_cpu:
            return exp(score_BHRS - lse_BHR[..., None]), lse_BHR
        factor_BHR1 = mx.where(empty_BHR[..., None], 0.0, 1.0 / total_BHR1)
        if sinks is not None:
            factor_BHR1 = factor_BHR1 * exp(plain_BHR - lse_BHR)[..., None]
        return score_BHRS * factor_BHR1, lse_BHR

    def _blocks(self, group: HeadGroup) -> list[_Block]:
        """The blocks of a group, in order, with the keys that Python knows to be enough."""
        L, S = self.problem.query_length, self.problem.key_length
        heads = _query_heads(self.problem, group.heads)
        return [_Block(group.batch, heads, rows, self.mask.key_range(rows, L, S)) for rows in group.rows]

    def _state(self, inputs: Arrays) -> Arrays:
        """All arrays that a group of heads reads, so that they can be tied to the group before."""
        fields = {name: getattr(self.mask, name) for name in _MASK_ARRAYS}
        state = inputs | {name: field for name, field in fields.items() if isinstance(field, mx.array)}
        if self.dropout > 0.0:
            state["dropout_key"] = self.dropout_key
        lengths = {"query_index": self.problem.query_length, "key_index": self.problem.key_length}
        return state | {name: mx.arange(length, dtype=mx.int32) for name, length in lengths.items()}

    def _part(self, state: Arrays, group: HeadGroup) -> Arrays:
        """What belongs to a group of heads, in the dtype of the computation; the key scaled if it may be."""
        batch, heads = slice(*group.batch), slice(*_query_heads(self.problem, group.heads))
        part = {}
        for name, array in state.items():
            if name in ("key", "value"):
                part[name] = array[batch, slice(*group.heads)].astype(self.dtype)
            elif name in ("query", "out", "lse", "d_out", "d_lse"):
                part[name] = array[batch, heads]
            elif name in ("alibi_slopes", "relative_bias", "sinks"):
                part[name] = array[heads].astype(mx.float32)
            elif name == "bias":
                part[name] = _axis_part(_axis_part(array, -4, group.batch), -3, (heads.start, heads.stop))
            elif name in _MASK_ARRAYS:
                part[name] = _axis_part(array, 0, group.batch)
            else:
                part[name] = array
        part["query"] = part["query"].astype(self.dtype)
        if self._scales_key:
            part["key"] = part["key"] * self.scale
        return part

    def _distance(self, state: Arrays, block: _Block) -> mx.array:
        """|query position - key position|, float32 (1 | B, 1, R, S)."""
        offset = state.get("query_offset")
        if offset is None:
            offset = self.mask.offset(self.problem.query_length, self.problem.key_length)
        position = state["query_index"][slice(*block.rows)] + (
            offset if isinstance(offset, int) else offset.reshape(-1, 1)
        )
        distance = position.reshape(-1, 1, _size(block.rows), 1) - state["key_index"][slice(*block.keys)]
        return mx.abs(distance).astype(mx.float32)

    def _diagonals(self, block: _Block) -> Range:
        """The entries [start, stop) of the relative bias that a block uses."""
        last = self.problem.query_length - 1
        return block.keys[0] - (block.rows[1] - 1) + last, block.keys[1] - block.rows[0] + last

    def _kept(self, state: Arrays, block: _Block) -> mx.array:
        part = slice(*block.batch), slice(*block.heads)
        B, H = self.problem.batch, self.problem.heads
        return keep_mask(state["dropout_key"], self.dropout, B, H, block.rows, block.keys, part)


_WHOLE_IN_A_GROUP = ("query", "key", "value")  # inputs whose gradients no two groups of heads share


# Every array of the size of a block's scores is computed from one of these. Ties cost time on the host: no others.
_TIED = ("query", "d_out", "bias", "query_index", "query_segments", "dropout_key")


def _after(state: Arrays, done: Iterable[mx.array]) -> Arrays:
    """The same arrays, but whatever is computed from them from here on waits for `done`."""
    names = [name for name in _TIED if name in state]
    return state | dict(zip(names, mx.depends([state[name] for name in names], list(done)), strict=True))


def _size(given: Range) -> int:
    return given[1] - given[0]


def _query_heads(problem: AttentionProblem, heads: Range) -> Range:
    """The query heads of a range of key heads."""
    return heads[0] * problem.group, heads[1] * problem.group


def _joined(parts: list[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def _assembled(parts: dict[tuple[Range, Range], mx.array]) -> mx.array:
    """One array of parts by (rows of the batch, heads), given in order."""
    rows: dict[Range, list[mx.array]] = {}
    for (batch, _), part in parts.items():
        rows.setdefault(batch, []).append(part)
    return _joined([_joined(heads, 1) for heads in rows.values()], 0)


def _axis_part(array: mx.array, axis: int, where: Range) -> mx.array:
    """The part `where` of an axis, or the array itself if it has no such axis or is broadcast over it."""
    if (axis < 0 and array.ndim < -axis) or array.ndim == 0 or array.shape[axis] == 1:
        return array
    return array[(slice(None),) * (axis % array.ndim) + (slice(*where),)]


def _added(total: mx.array, share: mx.array, axis: int, where: Range) -> mx.array:
    """`total` with `share` added at positions `where` of an axis."""
    share = share.astype(total.dtype)
    if where == (0, total.shape[axis]):
        return total + share
    return total.at[(slice(None),) * axis + (slice(*where),)].add(share)


def _block_of(bias: mx.array, rows: Range, keys: Range) -> mx.array:
    """The part of a bias, broadcastable to (B, H, Lq, Lk), that belongs to a block."""
    if bias.ndim >= 1 and bias.shape[-1] > 1:
        bias = bias[..., slice(*keys)]
    if bias.ndim >= 2 and bias.shape[-2] > 1:
        bias = bias[..., slice(*rows), :]
    return bias


def _added_bias(total: mx.array, d_score_BHRS: mx.array, block: _Block) -> mx.array:
    """The bias gradient so far with a block's share added, summed over the axes that the bias broadcasts over."""
    shape = (1,) * (4 - total.ndim) + total.shape
    axes = tuple(axis for axis in range(4) if shape[axis] == 1 and d_score_BHRS.shape[axis] > 1)
    share = d_score_BHRS.sum(axes, keepdims=True) if axes else d_score_BHRS
    where = tuple(slice(*part) if size > 1 else slice(None) for part, size in zip(block, shape, strict=True))
    return total.reshape(shape).at[where].add(share).reshape(total.shape)


def _spread_diagonals(table_HW: mx.array, used: Range, rows: Range, keys: Range) -> mx.array:
    """The relative bias of a block, (H, R, S): entry j - i + Lq - 1 of the table for query i and key j."""
    R, S = rows[1] - rows[0], keys[1] - keys[0]
    band = mx.contiguous(table_HW[:, slice(*used)])
    H, width = band.shape
    # Overlapping rows of one band: the last query of the block starts at its first entry, each earlier one further on.
    return mx.as_strided(band, (H, R, S), (width, 1, 1))[:, ::-1]


def _diagonal_sums(score_HRS: mx.array) -> mx.array:
    """Sums over each diagonal j - i, (H, R + S - 1), from the lowest; by shearing rows instead of scattering."""
    H, R, S = score_HRS.shape
    width = R + S - 1
    padded = mx.pad(score_HRS[:, ::-1], ((0, 0), (0, 0), (0, R)))  # rows of width + 1, read below as rows of width
    return padded.reshape(H, -1)[:, : R * width].reshape(H, R, width).sum(1)
