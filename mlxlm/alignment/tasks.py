"""What is learned from comparisons and from rollouts, as tasks of the trainer.

Each has `read(model, batch)`: the sum of losses, the number it is to be divided by, and the rewards that the model
gives to the answers, implicit ones where it has no head for them; the trainer asks for the first two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx
import numpy as np

from mlxlm.alignment import policies, preferences
from mlxlm.alignment.log_probabilities import answer_lengths, answer_log_probabilities, read, token_log_probabilities
from mlxlm.errors import UnsupportedModelError
from mlxlm.models import SequenceHeadSpec, Transformer

Arrays = dict[str, mx.array]
Batch = dict[str, np.ndarray]
Read = tuple[mx.array, mx.array, mx.array]


class AnswerTask:
    """A task over answers: what `mlxlm.training.Task` asks for, by way of `read`."""

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is; sources make them ready."""
        return batch

    def read(self, model: Transformer, batch: Arrays) -> Read:
        """Sum of losses, their number, and a reward for each answer (N,)."""
        raise NotImplementedError

    def loss(self, model: Transformer, batch: Arrays) -> tuple[mx.array, mx.array]:
        """Sum and number, see `mlxlm.training.Task`."""
        return self.read(model, batch)[:2]

    def for_evaluation(self) -> AnswerTask:
        """The task itself."""
        return self


def _sum_of_pairs(losses: mx.array, batch: Arrays) -> tuple[mx.array, mx.array]:
    """All pairs of a prompt weigh 1 together (Ouyang et al. 2022, section 3.5)."""
    return (losses * batch["pair_weights"]).sum(), batch["comparisons"].sum()


@dataclass(frozen=True, kw_only=True)
class RewardLoss(AnswerTask):
    """Rewards by a head of one number, see `preferences.pairwise_reward_losses`. Margins are those of the batch."""

    centering: float = 0.0

    def read(self, model: Transformer, batch: Arrays) -> Read:
        """See `AnswerTask`. Raises UnsupportedModelError for a model without such a head."""
        rewards = answer_rewards(model, batch)
        better, worse = rewards[batch["better"]], rewards[batch["worse"]]
        losses = preferences.pairwise_reward_losses(better, worse, margins=batch["margins"], centering=self.centering)
        return *_sum_of_pairs(losses, batch), rewards


def answer_rewards(model: Transformer, batch: Arrays) -> mx.array:
    """The reward of each prompt with its answer, (N,) float32, by a sequence classifier of one label."""
    head = model.config.head
    if not isinstance(head, SequenceHeadSpec) or len(head.labels) != 1:
        raise UnsupportedModelError(
            "a reward model has a head over sequences with one label; this one has another head"
        )
    return model(batch["tokens"], key_lengths=batch["key_lengths"])[:, 0].astype(mx.float32)


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(AnswerTask):
    """Pairs of answers without a reward model.

    method: "dpo", "ipo", "simpo" or "orpo", see `preferences` for each and its beta.  label_smoothing: of dpo and
    simpo.  gamma: of simpo.  reference_free: dpo without the reference.  means: ipo by mean log probabilities a token.
    """

    method: Literal["dpo", "ipo", "simpo", "orpo"]
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 1.0
    reference_free: bool = False
    means: bool = True

    @property
    def needs_reference(self) -> bool:
        """Whether batches must have `reference`."""
        return self.method in ("dpo", "ipo") and not self.reference_free

    def read(self, model: Transformer, batch: Arrays) -> Read:
        """See `AnswerTask`."""
        answers, lengths = answer_log_probabilities(model, batch), answer_lengths(batch)
        reference = batch["reference"] if self.needs_reference else mx.zeros_like(answers)
        better, worse = batch["better"], batch["worse"]
        pair, pair_lengths = (answers[better], answers[worse]), (lengths[better], lengths[worse])
        pair_reference = reference[better], reference[worse]
        if self.method == "dpo":
            losses = preferences.dpo_losses(
                *pair, *pair_reference, beta=self.beta, label_smoothing=self.label_smoothing
            )
        elif self.method == "ipo":
            means = dict(zip(("chosen_lengths", "rejected_lengths"), pair_lengths, strict=True)) if self.means else {}
            losses = preferences.ipo_losses(*pair, *pair_reference, beta=self.beta, **means)
        elif self.method == "simpo":
            losses = preferences.simpo_losses(
                *pair, *pair_lengths, beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing
            )
        else:
            losses = preferences.orpo_losses(*pair, *pair_lengths, beta=self.beta)
        by_length = self.method in ("simpo", "orpo") or (self.method == "ipo" and self.means)
        rewards = self.beta * (answers - reference) / (lengths if by_length else 1)
        return *_sum_of_pairs(losses, batch), rewards


@dataclass(frozen=True, kw_only=True)
class DesirabilityLoss(AnswerTask):
    """Single answers that are good or bad, see `preferences.kto_losses`.

    total: the sum over all processes of arrays of the same shape, where several have parts of a batch.
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    total: Callable[[mx.array], mx.array] = field(default=lambda array: array, repr=False, compare=False)
    needs_reference = True

    def read(self, model: Transformer, batch: Arrays) -> Read:
        """See `AnswerTask`; rewards are of the answers to their own prompts."""
        counted = batch["comparisons"]
        count = counted.shape[0]
        answers, reference = answer_log_probabilities(model, batch), batch["reference"]
        z = preferences.kto_divergence(mx.stop_gradient(answers[count:]), reference[count:], counted, self.total)
        losses = preferences.kto_losses(
            answers[:count], reference[:count], batch["desirable"], z, beta=self.beta,
            desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight,
        )  # fmt: skip
        return (losses * counted).sum(), counted.sum(), self.beta * (answers[:count] - reference[:count])


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(AnswerTask):
    """Rollouts and what they were worth: PPO with a value head, GRPO and its variants without.

    clip_low, clip_high: of the ratio.  normalisation, length: see `policies.summed`.  estimate: of the divergence from
    the reference that is added to the loss, `batch["beta"]` times.  value_weight, value_clip: of the value's loss,
    where the batch has returns.  pretraining_weight: of the mean loss of texts in the batch (PPO-ptx, Ouyang et al.
    2022, arXiv:2203.02155, equation 2).

    Batches: tokens, targets, key_lengths and places as of `log_probabilities`; mask (N, L); answers (), their number,
    0 for a row that fills up a process's share; old, advantages (N, L); reference (N, L) and beta () for a divergence
    in the loss; old_values, returns (N, L) for values; texts_tokens, texts_targets, texts_key_lengths, texts_places,
    texts_place_targets for texts, and texts_share (), the weight of the sum of their losses.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalisation: policies.Normalisation = "token"
    length: int | None = None
    estimate: str = "k3"
    value_weight: float = 0.1
    value_clip: float = 0.2
    pretraining_weight: float = 0.0

    def read(self, model: Transformer, batch: Arrays) -> Read:
        """See `AnswerTask`; rewards are the mean advantages of the answers, which this gives for completeness."""
        hidden = read(model, batch)
        found = token_log_probabilities(model, batch, hidden)
        losses = policies.clipped_policy_losses(
            found, batch["old"], batch["advantages"], clip_low=self.clip_low, clip_high=self.clip_high
        )
        if "beta" in batch:
            losses = losses + batch["beta"] * policies.divergence(found, batch["reference"], self.estimate)
        if "returns" in batch:
            values = token_values(model, hidden)
            of_values = policies.clipped_value_losses(
                values, batch["old_values"], batch["returns"], clip=self.value_clip
            )
            losses = losses + self.value_weight * of_values
        total, count = policies.summed(losses, batch["mask"], self.normalisation, self.length, batch["answers"])
        if "texts_tokens" in batch:
            texts = {name.removeprefix("texts_"): array for name, array in batch.items() if name.startswith("texts_")}
            total = total - self.pretraining_weight * texts["share"] * token_log_probabilities(model, texts).sum()
        return total, count, batch["advantages"].mean(axis=1)


def token_values(model: Transformer, hidden: mx.array) -> mx.array:
    """What the value head expects from each place on, (N, L) float32."""
    return model.value_head(hidden)[..., 0].astype(mx.float32)
