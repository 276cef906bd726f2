"""Losses of policies that learn from rewards: clipped policy and value losses of PPO, divergences, sums of GRPO.

Shapes: N answers, L tokens. Arrays (N, L) hold something for each token; `mask` (N, L) says which were
generated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import mlx.core as mx

Normalisation = Literal["sequence", "token", "constant"]


def divergence(log_probabilities: mx.array, reference: mx.array, estimate: str = "k3") -> mx.array:
    """An estimate of KL(policy || reference) for each token that the policy drew (Schulman 2020, "Approximating KL").

    With d = log ref - log pi: "k1" -d, unbiased; "k2" d^2 / 2, biased, of little variance; "k3" exp(d) - 1 - d, both
    unbiased and never negative, as GRPO has it (Shao et al. 2024, arXiv:2402.03300, equation 4).
    """
    return ESTIMATES[estimate](reference - log_probabilities)


ESTIMATES: dict[str, Callable[[mx.array], mx.array]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: mx.expm1(d) - d,
}


def clipped_policy_losses(
    log_probabilities: mx.array,
    old: mx.array,
    advantages: mx.array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> mx.array:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) of each token, r = pi / pi_old (Schulman et al. 2017,
    arXiv:1707.06347, equation 7); a larger clip_high leaves unlikely tokens room to rise (Yu et al. 2025, DAPO,
    arXiv:2503.14476, section 3.1).

    old: log probabilities by the policy that drew the tokens.  advantages: (N, L), or (N, 1) of whole answers.
    """
    ratio = mx.exp(log_probabilities - old)
    return -mx.minimum(ratio * advantages, mx.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)


def clipped_value_losses(values: mx.array, old: mx.array, returns: mx.array, *, clip: float = 0.2) -> mx.array:
    """max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2 of each token, as the implementation of PPO has
    it (Schulman et al. 2017, arXiv:1707.06347; Huang et al. 2024, arXiv:2403.17031, detail 12).
    """
    near = mx.clip(values, old - clip, old + clip)
    return mx.maximum((values - returns) ** 2, (near - returns) ** 2) / 2


def summed(
    losses: mx.array,
    mask: mx.array,
    normalisation: Normalisation,
    length: int | None = None,
    answers: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """A sum of the losses of tokens (N, L), float32, and the number that it is to be divided by, int32: two scalars.

    normalisation: "sequence": the mean over answers of each one's mean over its tokens (GRPO, arXiv:2402.03300,
    equation 3).  "token": the mean over all tokens (DAPO, arXiv:2503.14476, equation 8).  "constant": the mean over
    answers of each one's sum over `length`, the most tokens of an answer, so that no token counts less for standing in
    a long answer (Dr. GRPO, arXiv:2503.20783, section 3.2).
    An answer without a token in the mask does not count, but with "constant" still does: its share is 0.  answers: how
    many there are of these, default all rows.
    """
    losses = mx.where(mask, losses, 0.0)
    if normalisation == "token":
        return losses.sum(), mask.sum()
    if normalisation == "constant":
        assert length is not None
        return losses.sum() / length, mx.array(mask.shape[0]) if answers is None else answers
    lengths = mask.sum(axis=1)
    return (losses.sum(axis=1) / mx.maximum(lengths, 1)).sum(), (lengths > 0).sum()
