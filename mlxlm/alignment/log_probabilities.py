"""Log probabilities of answers: made in chunks, so that memory grows with the length alone and not with the vocabulary.

Shapes: N answers, L tokens of a padded row, P places with a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.data import IGNORE, Batch
from mlxlm.errors import UnsupportedModelError
from mlxlm.kernels.cross_entropy import fused_linear_cross_entropy
from mlxlm.models import Transformer
from mlxlm.models.recomputation import chance, drawn_key

Arrays = dict[str, mx.array]

_PART_BYTES = 32 * 1024**2  # of the float32 logits that exist at once where a head has to be called for them
_PARTS = 16  # numbers of places are rounded up to this part of a batch, which bounds the shapes that steps have


def with_places(batch: Batch) -> Batch:
    """The batch with `places` (P,), flat, and `place_targets` (P,) of its targets (N, L): logits are made there alone.

    What pads both says -100.
    """
    targets = batch["targets"].reshape(-1)
    found = np.flatnonzero(targets != IGNORE)
    unit = -(-targets.size // _PARTS)
    room = max(-(-found.size // unit), 1) * unit
    places, wanted = np.zeros(room, dtype=np.int32), np.full(room, IGNORE, dtype=np.int32)
    places[: found.size], wanted[: found.size] = found, targets[found]
    return {**batch, "places": places, "place_targets": wanted}


def read(model: Transformer, batch: Arrays) -> mx.array:
    """Last hidden states (N, L, dim) of a batch's tokens. Raises UnsupportedModelError for what is no decoder."""
    if model.config.has_memory or model.config.decoder is None or model.config.fills_blanks:
        raise UnsupportedModelError("alignment is for decoders; this model has an encoder or fills blanks")
    return model.hidden(batch["tokens"], key_lengths=batch["key_lengths"])


def token_log_probabilities(model: Transformer, batch: Arrays, hidden: mx.array | None = None) -> mx.array:
    """log p of each target from what stands before it, (N, L) float32, 0 where there is none.

    batch: tokens (N, L), key_lengths (N,), and places and place_targets, see `with_places`.  hidden: from `read`,
    default computed here.
    """
    hidden = read(model, batch) if hidden is None else hidden
    targets, rows = batch["place_targets"], hidden.reshape(-1, hidden.shape[-1])[batch["places"]]
    head = model.head.projection(rows, model.embeddings.token)
    if head is None:  # an adapter around the head: no single weight describes it
        found = _by_parts(model, rows, targets)
    else:
        found = -fused_linear_cross_entropy(
            head.hidden, head.weight, targets, bias=head.bias, softcap=head.softcap, logit_scale=head.scale,
            reduction="none", weight_gradient=head.trainable, shard=head.shard,
            # In a training step the gradients are sure to be asked for.
            one_pass=model.training and head.shard is None and head.bias is None and not head.trainable,
        )  # fmt: skip
    shape = batch["tokens"].shape
    return mx.zeros(shape[0] * shape[1]).at[batch["places"]].add(found).reshape(shape)


def _by_parts(model: Transformer, rows: mx.array, targets: mx.array) -> mx.array:
    """log p of targets (P,) after hidden states (P, dim) by a head that has to be called for its logits. They are made
    for a few places at a time, and computed again for the gradients, so that no more of them ever exist.
    """
    modules = {"head": model.head, "table": model.embeddings.token}
    trained = tree_flatten({name: module.trainable_parameters() for name, module in modules.items()})
    names, arrays = [name for name, _ in trained], [array for _, array in trained]
    size = max(1, _PART_BYTES // (4 * model.config.head.vocab_size))
    # A key for each part, so that dropout is the same in both computations.
    parts = [(slice(at, at + size), drawn_key(model.head)) for at in range(0, rows.shape[0], size)]

    def hold(values: Sequence[mx.array]) -> None:
        if names:
            for name, held in tree_unflatten(list(zip(names, values, strict=True))).items():
                modules[name].update(held)

    def part(rows: mx.array, values: Sequence[mx.array], where: slice, key: mx.array | None) -> mx.array:
        hold(values)
        with chance(key):
            logits = model.logits(rows).astype(mx.float32)
        own = mx.take_along_axis(logits, mx.maximum(targets[where], 0)[:, None], axis=-1)[:, 0]
        return mx.where(targets[where] == IGNORE, 0.0, own - mx.logsumexp(logits, axis=-1))

    @mx.custom_function
    def run(rows: mx.array, *values: mx.array) -> mx.array:
        return mx.concatenate([part(rows[where], values, where, key) for where, key in parts])

    @run.vjp
    def run_vjp(given: Any, cotangent: mx.array, _: mx.array) -> Any:
        rows, *values = [given] if isinstance(given, mx.array) else given
        totals, of_rows = [mx.zeros(value.shape) for value in values], []
        for where, key in parts:
            # Not before the part before it is done: its logits and its gradient of the head are then gone.
            here, *held = mx.depends([rows[where], *values], [cotangent, *totals])
            _, (own, *more) = mx.vjp(
                lambda x, *v, where=where, key=key: part(x, v, where, key), [here, *held], [cotangent[where]]
            )
            of_rows.append(own)
            totals = [total + one.astype(mx.float32) for total, one in zip(totals, more, strict=True)]
        hold(values)
        whole = mx.concatenate(of_rows)
        return (whole, *(t.astype(v.dtype) for t, v in zip(totals, values, strict=True))) if values else whole

    found = run(rows, *arrays)
    hold(arrays)  # while a graph is made, modules hold the arrays of that graph
    return found


def answer_log_probabilities(model: Transformer, batch: Arrays) -> mx.array:
    """log p of each answer, (N,) float32: the sum over its tokens."""
    return token_log_probabilities(model, batch).sum(axis=1)


def answer_lengths(batch: Arrays) -> mx.array:
    """Tokens of each answer, (N,), at least 1."""
    return mx.maximum((batch["targets"] != IGNORE).sum(axis=1), 1)
