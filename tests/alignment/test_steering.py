"""The price of divergence is steered so that divergence stays within its target, with as much reward as that allows."""

from __future__ import annotations

import numpy as np
import pytest

from mlxlm.alignment.advantages import steered

TARGET = 0.5


def drawn():
    """Rewards of 50 answers, and the reference's log probabilities of them."""
    rng = np.random.default_rng(0)
    return rng.random(50), np.log(rng.dirichlet(np.full(50, 2.0)))


def policy(scores):
    scores = np.exp(scores - scores.max())
    return scores / scores.sum()


def learned(beta, *, steer, iterations=120):
    """Divergence and reward after each iteration of four steps along the exact gradient of reward - beta * KL."""
    rewards, reference = drawn()
    rng, scores, rows = np.random.default_rng(1), reference.copy(), []
    for _ in range(iterations):
        for _ in range(4):
            p = policy(scores)
            gain = rewards - beta * (np.log(p) - reference)
            scores = scores + p * (gain - p @ gain)
        p = policy(scores)
        divergence = p @ (np.log(p) - reference)
        rows.append((divergence, p @ rewards))
        if steer:
            beta = steered(beta, divergence * rng.normal(1, 0.05), TARGET)  # it is estimated from some answers
    return np.array(rows)


def most_reward():
    """Of all policies within the target: ref * exp(reward / beta), normalised, with the beta that gives the target."""
    rewards, reference = drawn()
    low, high = 1e-3, 10.0
    for _ in range(60):
        beta = (low * high) ** 0.5
        p = policy(reference + rewards / beta)
        low, high = (beta, high) if p @ (np.log(p) - reference) > TARGET else (low, beta)
    return p @ rewards


@pytest.mark.parametrize("beta", [0.02, 0.2, 2.0])
def test_divergence_stays_within_the_target_wherever_the_price_begins(beta):
    found = learned(beta, steer=True)[60:]
    assert found[:, 0].max() < 1.1 * TARGET
    assert 0.8 * TARGET < found[:, 0].mean() <= TARGET
    assert found[-1, 1] > 0.97 * most_reward()


def test_a_constant_price_passes_it():
    assert learned(0.02, steer=False)[-1, 0] > 4 * TARGET


def test_the_price_follows_the_ratio_above_the_target_and_slowly_below():
    assert steered(0.1, 2.0, 1.0) == pytest.approx(0.2)
    assert steered(0.1, 50.0, 1.0) == pytest.approx(0.4)
    assert steered(0.1, 0.5, 1.0) == pytest.approx(0.095)
    assert steered(0.1, -0.1, 1.0) == pytest.approx(0.09)  # an estimate may be below 0
    assert steered(0.0, 2.0, 1.0) == pytest.approx(2e-4)
