"""Log probabilities of answers: made in chunks, so that memory grows with the length alone and not with the vocabulary.

Shapes: N answers, L tokens of a padded row, P places with a target.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxlm.data import IGNORE, Batch
from mlxlm.errors import UnsupportedModelError
from mlxlm.kernels.cross_entropy import fused_linear_cross_entropy
from mlxlm.models import Transformer

Arrays = dict[str, mx.array]

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
        logits = model.logits(rows).astype(mx.float32)
        own = mx.take_along_axis(logits, mx.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        found = mx.where(targets == IGNORE, 0.0, own - mx.logsumexp(logits, axis=-1))
    else:
        found = -fused_linear_cross_entropy(
            head.hidden, head.weight, targets, bias=head.bias, softcap=head.softcap, logit_scale=head.scale,
            reduction="none", weight_gradient=head.trainable, shard=head.shard,
            # In a training step the gradients are sure to be asked for.
            one_pass=model.training and head.shard is None and head.bias is None and not head.trainable,
        )  # fmt: skip
    shape = batch["tokens"].shape
    return mx.zeros(shape[0] * shape[1]).at[batch["places"]].add(found).reshape(shape)


def answer_log_probabilities(model: Transformer, batch: Arrays) -> mx.array:
    """log p of each answer, (N,) float32: the sum over its tokens."""
    return token_log_probabilities(model, batch).sum(axis=1)


def answer_lengths(batch: Arrays) -> mx.array:
    """Tokens of each answer, (N,), at least 1."""
    return mx.maximum((batch["targets"] != IGNORE).sum(axis=1), 1)
