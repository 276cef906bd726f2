"""From rewards to advantages: how much better each token, or each answer, was than expected. NumPy, in float64.

Shapes as in `policies`: N answers, L tokens, `mask` (N, L) of the tokens that were generated, without a gap from each
answer's first to its last.
"""

from __future__ import annotations

import numpy as np

_LEAST_DEVIATION = 1e-4  # added to a group's standard deviation
# How fast the price of divergence follows: above the target with the ratio, at most so many times; below it by a share
# of what is missing. A short run can't wait for the 2% an iteration of Ziegler et al.; and as divergence comes later
# than its price, a price that fell as fast as it rises would be next to nothing when the target is first reached.
_RISE, _FALL, _LEAST_BETA = 4.0, 0.1, 1e-4


def token_rewards(
    rewards: np.ndarray, log_probabilities: np.ndarray, reference: np.ndarray, mask: np.ndarray, *, beta: float
) -> np.ndarray:
    """-beta * (log pi - log ref) at each token, and the answer's reward at its last one, (N, L) (Ouyang et al. 2022,
    arXiv:2203.02155, equation 2; Ziegler et al. 2019, arXiv:1909.08593).

    rewards (N,).  beta: price of a nat of divergence.
    """
    found = np.where(mask, -beta * (log_probabilities - reference), 0.0)
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    any_token = mask.any(axis=1)
    found[np.flatnonzero(any_token), last[any_token]] += rewards[any_token]
    return found


def steered(beta: float, divergence: float, target: float) -> float:
    """The price of divergence for the next iteration, which holds divergence at the target or a little below: times
    r = divergence / target above it, at most 4; times 1 + 0.1 * (r - 1) below it. After the proportional controller of
    Ziegler et al. 2019 (arXiv:1909.08593, section 2.2), which has 1 + 0.1 * clip(r - 1, -0.2, 0.2) on both sides.

    divergence, target: nats an answer.
    """
    ratio = divergence / target
    return max(beta, _LEAST_BETA) * (min(ratio, _RISE) if ratio > 1 else 1 + _FALL * (max(ratio, 0.0) - 1))


def generalised_advantages(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of each token, (N, L) each: A_t = d_t + gamma * lam * A_(t+1) with
    d_t = r_t + gamma * V_(t+1) - V_t, and returns A + V (Schulman et al. 2015, arXiv:1506.02438, equation 16).

    rewards, values (N, L).  gamma: discount, default 1.  lam: of the exponential average, default 0.95.
    """
    rewards, values = (np.where(mask, array, 0.0).astype(np.float64) for array in (rewards, values))
    advantages = np.zeros_like(rewards)
    following, next_value = np.zeros(len(rewards)), np.zeros(len(rewards))
    for place in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, place]
        difference = rewards[:, place] + gamma * next_value - values[:, place]
        following = np.where(here, difference + gamma * lam * following, 0.0)
        next_value = np.where(here, values[:, place], 0.0)
        advantages[:, place] = following
    return advantages, np.where(mask, advantages + values, 0.0)


def whitened(values: np.ndarray, mask: np.ndarray, *, centred: bool = True) -> np.ndarray:
    """Values (N, L) over the mask divided by their standard deviation, and with mean 0 if centred; 0 elsewhere
    (Huang et al. 2024, arXiv:2403.17031, details 10 and 17). A single value has no deviation and stays what it is.
    """
    chosen = values[mask]
    if len(chosen) < 2:
        return np.where(mask, values, 0.0)
    mean, deviation = chosen.mean(), np.sqrt(chosen.var() + 1e-8)
    return np.where(mask, (values - mean) / deviation + (0.0 if centred else mean), 0.0)


def group_advantages(rewards: np.ndarray, size: int, *, scaled: bool = True) -> np.ndarray:
    """(r - mean) / (std + 1e-4) of each answer in its prompt's group, (N,) (Shao et al. 2024, arXiv:2402.03300, section
    4.1.2); std is that of a sample (n - 1).

    rewards (N,): groups of `size` answers one after another.  scaled: False leaves std out (Dr. GRPO, Liu et al. 2025,
    arXiv:2503.20783, section 3.2), so that prompts that are nearly always right or wrong don't weigh more.
    """
    groups = rewards.astype(np.float64).reshape(-1, size)
    away = groups - groups.mean(axis=1, keepdims=True)
    if scaled:
        deviation = groups.std(axis=1, ddof=1, keepdims=True) if size > 1 else 0.0
        away = away / (deviation + _LEAST_DEVIATION)
    return away.reshape(-1)


def overlong_penalties(lengths: np.ndarray, *, longest: int, buffer: int) -> np.ndarray:
    """What is added to the reward of answers that come near the most tokens allowed: 0 up to longest - buffer, then in
    a straight line down to -1 at `longest` (DAPO, arXiv:2503.14476, equation 13, soft overlong punishment). (N,)
    """
    return -np.clip((lengths - (longest - buffer)) / buffer, 0.0, 1.0)
