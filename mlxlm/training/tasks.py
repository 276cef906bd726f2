"""Tasks: what is learned from a batch, as a sum of losses and the number of targets that it is over.

A step divides the sums over all its batches by the numbers over all its batches, so that every target counts the same,
however the targets are spread over batches.
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlm.errors import DataError, UnsupportedModelError, UsageError
from mlxlm.kernels.cross_entropy import fused_linear_cross_entropy
from mlxlm.models import Transformer

IGNORE = -100
_NOT_INPUTS = ("tokens", "targets", "labels", "next_sentence_labels", "places")
PLACES = 16  # places of targets are padded to this part of a batch, which bounds the shapes that steps are compiled for

Arrays = dict[str, mx.array]


class Task(Protocol):
    """A loss of a model on a batch."""

    def prepare(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch as `loss` wants it, made outside the compiled step."""

    def loss(self, model: Transformer, batch: Arrays) -> tuple[mx.array, mx.array]:
        """Sum of the losses of all targets, float32, and how many there are, int32: two scalars."""

    def for_evaluation(self) -> Task:
        """The same task without what only training has, such as label smoothing."""


@dataclass(frozen=True, kw_only=True)
class WordLoss:
    """Cross-entropy of the words that `batch["targets"]` names, -100 where none is to be predicted.

    Logits are made in chunks of the vocabulary (`fused_linear_cross_entropy`), and where less than half of the places
    has a target, as in masked language models, at these places alone.
    With `next_sentence_labels` (B,) in the batch the mean loss of the next-sentence head is added to the mean loss of
    the words of that batch (Devlin et al. 2018, arXiv:1810.04805).

    label_smoothing, z_loss: see the kernel, default 0.  chunk: words at once, default by a memory budget.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int | None = None

    def prepare(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch, with targets (P,) and their flat `places` (P,) instead of targets (B, L) where that is less."""
        if "targets" not in batch:
            raise DataError("the batches have no targets, so there are no words to predict")
        targets = batch["targets"].reshape(-1)
        places = np.flatnonzero(targets != IGNORE)
        unit = -(-targets.size // PLACES)
        room = max(-(-places.size // unit), 1) * unit
        if 2 * room > targets.size:
            return batch
        chosen = np.full(room, IGNORE, dtype=np.int32)
        chosen[: places.size] = targets[places]
        where = np.zeros(room, dtype=np.int32)
        where[: places.size] = places
        return {**batch, "targets": chosen, "places": where}

    def loss(self, model: Transformer, batch: Arrays) -> tuple[mx.array, mx.array]:
        """Sum and number, see `Task`. Raises UnsupportedModelError for a model that predicts no words."""
        if not model.config.predicts_words:
            raise UnsupportedModelError("this model predicts no words; its head is for labels, or it has none")
        inputs = {name: array for name, array in batch.items() if name not in _NOT_INPUTS}
        hidden, targets = model.hidden(batch["tokens"], **inputs), batch["targets"]
        first = hidden
        if "places" in batch:
            hidden = hidden.reshape(-1, hidden.shape[-1])[batch["places"]]
        total = self._words(model, hidden, targets)
        count = (targets != IGNORE).sum()
        if "next_sentence_labels" in batch:
            if "next_sentence" not in getattr(model, "pooler", {}):
                raise UnsupportedModelError(
                    "the batches have next_sentence_labels, but this model has no head for them"
                )
            labels = batch["next_sentence_labels"]
            logits = model.pooler.next_sentence(model.pooler(first)).astype(mx.float32)
            total = total + count * nn.losses.cross_entropy(logits, labels, reduction="mean")
        return total, count

    def _words(self, model: Transformer, hidden: mx.array, targets: mx.array) -> mx.array:
        head = model.head.projection(hidden, model.embeddings.token)
        if head is None:
            return _dense_loss(model.logits(hidden), targets, self.label_smoothing, self.z_loss)
        return fused_linear_cross_entropy(
            head.hidden,
            head.weight,
            targets,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.scale,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction="sum",
            weight_gradient=head.trainable,
            # In a training step the gradients are sure to be asked for.
            one_pass=model.training and head.shard is None,
            chunk=self.chunk,
            shard=head.shard,
        )

    def for_evaluation(self) -> WordLoss:
        """Without label smoothing and z-loss: then exp(loss) is the perplexity."""
        return replace(self, label_smoothing=0.0, z_loss=0.0)


@dataclass(frozen=True, kw_only=True)
class LabelLoss:
    """Cross-entropy of `batch["labels"]`: (B,) of sequences or (B, L) of tokens, -100 where there is none.

    label_smoothing: share of the target's probability that is spread over all labels, default 0.
    """

    label_smoothing: float = 0.0

    def prepare(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch as it is. Raises DataError without labels."""
        if "labels" not in batch:
            raise DataError("the batches have no labels to learn")
        return batch

    def loss(self, model: Transformer, batch: Arrays) -> tuple[mx.array, mx.array]:
        """Sum and number, see `Task`. Raises UnsupportedModelError for a model without a head for labels."""
        if model.config.head is None or model.config.predicts_words:
            raise UnsupportedModelError("this model has no head for labels; see with_classification_head")
        inputs = {name: array for name, array in batch.items() if name not in _NOT_INPUTS}
        labels, logits = batch["labels"], model(batch["tokens"], **inputs)
        return _dense_loss(logits, labels, self.label_smoothing, 0.0), (labels != IGNORE).sum()

    def for_evaluation(self) -> LabelLoss:
        """Without label smoothing."""
        return replace(self, label_smoothing=0.0)


def regularised(task: Task, **wanted: float) -> Task:
    """The task with the values above 0 among `label_smoothing` and `z_loss`, so that none is set without effect.

    Raises UsageError for a task that has no such value, or another one already.
    """
    for name, value in wanted.items():
        if not value:
            continue
        mine = getattr(task, name, None)
        if mine is None or not is_dataclass(task):
            raise UsageError(f"{name} is {value!r}, but {type(task).__name__} has no {name}; leave it at 0")
        if mine not in (0, value):
            raise UsageError(f"{name} is {value!r} in the settings and {mine!r} in the task; set it once")
        task = replace(task, **{name: value})
    return task


def _dense_loss(logits: mx.array, targets: mx.array, label_smoothing: float, z_loss: float) -> mx.array:
    """Sum over targets of the loss of logits (..., classes) that exist as a whole."""
    logits = logits.astype(mx.float32)
    counted = targets != IGNORE
    log_sum = mx.logsumexp(logits, axis=-1)
    of_target = mx.take_along_axis(logits, mx.where(counted, targets, 0)[..., None], axis=-1).squeeze(-1)
    losses = log_sum - (1.0 - label_smoothing) * of_target + z_loss * log_sum**2
    if label_smoothing:
        losses = losses - label_smoothing * logits.mean(-1)
    return mx.where(counted, losses, 0.0).sum()
