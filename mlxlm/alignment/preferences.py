"""Losses of preferences: rewards of pairs, DPO and its relatives, ORPO, KTO. Arrays in, one loss an example out.

Shapes: P pairs, or N answers. `chosen`, `rejected`: log probabilities of whole answers, sums over their tokens, natural
logarithm; `reference_...` those of the model that training began with. Whoever calls takes the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from mlx import nn

log_sigmoid = nn.log_sigmoid


def pairwise_reward_losses(
    chosen: mx.array, rejected: mx.array, *, margins: mx.array | None = None, centering: float = 0.0
) -> mx.array:
    """-log sigmoid(r_w - r_l - m), (P,): the better answer's reward is to be the larger one (Ouyang et al. 2022,
    arXiv:2203.02155, equation 1; Bradley and Terry 1952).

    chosen, rejected (P,): rewards.  margins (P,): by how much, default 0 (Touvron et al. 2023, arXiv:2307.09288,
    section 3.2.2).  centering: adds centering * (r_w + r_l)^2, which keeps rewards around 0, default 0 (Eisenstein et
    al. 2023, arXiv:2312.09244).
    """
    difference = chosen - rejected if margins is None else chosen - rejected - margins
    losses = -log_sigmoid(difference)
    return losses + centering * (chosen + rejected) ** 2 if centering else losses


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) places of all pairs among one prompt's answers, of which a larger rank is better; ties make none.

    Of K answers without ties there are K (K - 1) / 2, each of which counts by that number's inverse.
    """
    count = range(len(ranks))
    return [(i, j) for i in count for j in count if ranks[i] > ranks[j]]


def dpo_losses(
    chosen: mx.array,
    rejected: mx.array,
    reference_chosen: mx.array | float,
    reference_rejected: mx.array | float,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> mx.array:
    """-log sigmoid(beta * h), (P,), h = log(pi_w / ref_w) - log(pi_l / ref_l) (Rafailov et al. 2023, arXiv:2305.18290).

    beta: how strongly the policy is held to the reference.  label_smoothing: share of pairs that are taken to be the
    wrong way round, (1 - e) * loss(h) + e * loss(-h), default 0 (Mitchell 2023, conservative DPO).
    Without a reference (0 for both) the policy's own odds alone are raised.
    """
    return _smoothed(beta * ((chosen - rejected) - (reference_chosen - reference_rejected)), label_smoothing)


def _smoothed(logits: mx.array, label_smoothing: float) -> mx.array:
    """-log sigmoid, where a share of the pairs is taken to be the wrong way round."""
    return -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)


def ipo_losses(
    chosen: mx.array,
    rejected: mx.array,
    reference_chosen: mx.array | float,
    reference_rejected: mx.array | float,
    *,
    beta: float = 0.1,
    chosen_lengths: mx.array | float = 1.0,
    rejected_lengths: mx.array | float = 1.0,
) -> mx.array:
    """(h - 1 / (2 beta))^2, (P,), h = log(pi_w / ref_w) - log(pi_l / ref_l) (Azar et al. 2023, arXiv:2310.12036,
    equation 17, where beta is tau).

    lengths (P,): tokens of the answers, for means a token instead of sums; default sums. The paper is silent, and a
    target of 1 / (2 beta) for sums depends on the length; its authors' results are with means, as trl reports.
    """
    away = (chosen - reference_chosen) / chosen_lengths - (rejected - reference_rejected) / rejected_lengths
    return (away - 1 / (2 * beta)) ** 2


def simpo_losses(
    chosen: mx.array,
    rejected: mx.array,
    chosen_lengths: mx.array,
    rejected_lengths: mx.array,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> mx.array:
    """-log sigmoid(beta * (mean log pi_w - mean log pi_l) - gamma), (P,): no reference, and answers count by their mean
    log probability a token (Meng et al. 2024, arXiv:2405.14734, equation 6).

    lengths (P,): tokens of the answers.  gamma: margin of the rewards.  label_smoothing: as in `dpo_losses`.
    """
    return _smoothed(beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma, label_smoothing)


def log_odds(log_probability: mx.array) -> mx.array:
    """log(p / (1 - p)) of log p < 0, exact at both ends."""
    near_one = log_probability > -0.6931472
    # Each branch is given a harmless value where the other one is taken, so that no gradient is infinite times 0.
    low = mx.where(near_one, -1.0, log_probability)
    high = mx.where(near_one, mx.minimum(log_probability, -1e-30), -0.1)
    return log_probability - mx.where(near_one, mx.log(-mx.expm1(high)), mx.log1p(-mx.exp(low)))


def odds_ratio_losses(
    chosen: mx.array, rejected: mx.array, chosen_lengths: mx.array, rejected_lengths: mx.array
) -> mx.array:
    """-log sigmoid(log odds_w - log odds_l), (P,), odds of the mean log probability a token (Hong et al. 2024,
    arXiv:2403.07691, equations 4 and 7).
    """
    return -log_sigmoid(log_odds(chosen / chosen_lengths) - log_odds(rejected / rejected_lengths))


def orpo_losses(
    chosen: mx.array,
    rejected: mx.array,
    chosen_lengths: mx.array,
    rejected_lengths: mx.array,
    *,
    beta: float = 0.1,
) -> mx.array:
    """Mean loss of the chosen answer's tokens + beta * `odds_ratio_losses`, (P,): supervised fine-tuning and preference
    in one, without a reference (Hong et al. 2024, arXiv:2403.07691, equation 6, where beta is lambda).
    """
    return -chosen / chosen_lengths + beta * odds_ratio_losses(chosen, rejected, chosen_lengths, rejected_lengths)


def kto_losses(
    answers: mx.array,
    reference: mx.array,
    desirable: mx.array,
    divergence: mx.array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> mx.array:
    """w_d * (1 - sigmoid(beta * (log(pi / ref) - z))) of good answers, w_u * (1 - sigmoid(beta * (z - log(pi / ref))))
    of bad ones, (N,): no pairs are needed (Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8).

    answers, reference (N,): log probabilities.  desirable (N,): bool.  divergence: z, an estimate of the policy's
    divergence from the reference, see `kto_divergence`; no gradient flows through it.
    """
    away = answers - reference - mx.stop_gradient(divergence)
    good, bad = (weight * mx.sigmoid(sign * beta * away)
                 for sign, weight in ((-1, desirable_weight), (1, undesirable_weight)))  # fmt: skip
    return mx.where(desirable, good, bad)


def kto_divergence(
    answers: mx.array,
    reference: mx.array,
    counted: mx.array | None = None,
    total: Callable[[mx.array], mx.array] = lambda array: array,
) -> mx.array:
    """max(0, mean of log(pi / ref)) over answers (N,) that belong to other prompts than those they are read after.

    counted (N,): 0 for answers that don't count.  total: sums an array over the processes that have parts of a batch.
    """
    counted = mx.ones_like(answers) if counted is None else counted.astype(answers.dtype)
    sums = total(mx.stack([((answers - reference) * counted).sum(), counted.sum()]))
    return mx.maximum(sums[0] / mx.maximum(sums[1], 1), 0)


def calibration_error(probabilities: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over bins of equal width, each weighing
    by its share (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599).

    probabilities (N,): of what was predicted.  right (N,): whether it was so.
    """
    number = np.minimum((probabilities * bins).astype(int), bins - 1)
    error = 0.0
    for one in np.unique(number):
        inside = number == one
        error += inside.mean() * abs(probabilities[inside].mean() - right[inside].mean())
    return float(error)
