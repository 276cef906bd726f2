"""Every loss and its gradient against numpy in float64 and, where trl has it, against what trl made of the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.alignment import advantages, policies, preferences

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parents[1] / "fixtures" / "alignment" / "trl.json").read_text())
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numeric(function, x, step=1e-5):
    """The gradient of a scalar function of float64 arrays, by central differences."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[place] += step
        behind[place] -= step
        gradient[place] = (function(ahead) - function(behind)) / (2 * step)
    return gradient


def check(ours, theirs, x):
    """Values one by one, and the gradient of their sum weighted unevenly, so that each of them shows."""
    found = ours(mx.array(x, dtype=mx.float32))
    wanted = theirs(x)
    np.testing.assert_allclose(np.array(found), wanted, rtol=1e-5, atol=1e-5)
    weights = np.linspace(0.5, 1.5, wanted.size).reshape(wanted.shape)
    gradient = mx.grad(lambda x: (ours(x) * mx.array(weights, dtype=mx.float32)).sum())(mx.array(x, dtype=mx.float32))
    np.testing.assert_allclose(
        np.array(gradient), numeric(lambda x: (theirs(x) * weights).sum(), x), atol=1e-5, rtol=1e-5
    )


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def pairs(rng):
    """Log probabilities (2, 5) of policy and of reference, and lengths."""
    x, reference = (np.float32(-rng.uniform(0.5, 6, (2, 5))).astype(np.float64) for _ in range(2))
    return x, reference, rng.integers(1, 9, (2, 5))


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_rewards_of_pairs(pairs, margins, centering):
    x = pairs[0]
    m = np.array([0.0, 1.0, 0.5, 2.0, 0.1]) if margins else np.zeros(5)
    check(
        lambda x: preferences.pairwise_reward_losses(
            x[0], x[1], margins=mx.array(m, dtype=mx.float32) if margins else None, centering=centering
        ),
        lambda x: -np.log(sigmoid(x[0] - x[1] - m)) + centering * (x[0] + x[1]) ** 2,
        x,
    )


def test_pairs_of_ranked_answers():
    assert preferences.ranked_pairs([3, 1, 2]) == [(0, 1), (0, 2), (2, 1)]
    assert len(preferences.ranked_pairs(range(9))) == 36
    assert preferences.ranked_pairs([1, 1, 0]) == [(0, 2), (1, 2)]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("free", [False, True], ids=["reference", "reference-free"])
def test_dpo(pairs, smoothing, free):
    x, reference, _ = pairs
    reference = 0 * reference if free else reference
    given = (0.0, 0.0) if free else mx.array(reference, dtype=mx.float32)

    def theirs(x):
        h = 0.3 * (x[0] - reference[0] - x[1] + reference[1])
        return -(1 - smoothing) * np.log(sigmoid(h)) - smoothing * np.log(sigmoid(-h))

    check(lambda x: preferences.dpo_losses(x[0], x[1], *given, beta=0.3, label_smoothing=smoothing), theirs, x)


@pytest.mark.parametrize("means", [False, True], ids=["sums", "means"])
def test_ipo(pairs, means):
    x, reference, lengths = pairs
    lengths = lengths if means else np.ones((2, 5))
    given = {"chosen_lengths": mx.array(lengths[0]), "rejected_lengths": mx.array(lengths[1])} if means else {}
    check(
        lambda x: preferences.ipo_losses(x[0], x[1], *mx.array(reference, dtype=mx.float32), beta=0.3, **given),
        lambda x: ((x - reference)[0] / lengths[0] - (x - reference)[1] / lengths[1] - 1 / 0.6) ** 2,
        x,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo(pairs, smoothing):
    x, _, lengths = pairs

    def theirs(x):
        h = 2.5 * (x[0] / lengths[0] - x[1] / lengths[1]) - 0.7
        return -(1 - smoothing) * np.log(sigmoid(h)) - smoothing * np.log(sigmoid(-h))

    check(
        lambda x: preferences.simpo_losses(
            x[0], x[1], *mx.array(lengths), beta=2.5, gamma=0.7, label_smoothing=smoothing
        ),
        theirs,
        x,
    )


def test_orpo(pairs):
    x, _, lengths = pairs

    def theirs(x):
        p = np.exp(x / lengths)
        odds = p / (1 - p)
        return -x[0] / lengths[0] - 0.4 * np.log(sigmoid(np.log(odds[0]) - np.log(odds[1])))

    check(lambda x: preferences.orpo_losses(x[0], x[1], *mx.array(lengths), beta=0.4), theirs, x)


def test_log_odds_are_exact_at_both_ends():
    x = np.array([-1e-6, -1e-3, -0.69, -0.7, -5.0, -60.0])
    found = np.array(preferences.log_odds(mx.array(x, dtype=mx.float32)), dtype=np.float64)
    x = np.float64(np.float32(x))
    np.testing.assert_allclose(found, x - np.log(-np.expm1(x)), rtol=2e-6, atol=2e-7)
    gradient = mx.grad(lambda x: preferences.log_odds(x).sum())(mx.array([*x.tolist(), 0.0], dtype=mx.float32))
    np.testing.assert_allclose(np.array(gradient)[:-1], 1 / -np.expm1(x), rtol=1e-5)
    assert np.isfinite(np.array(gradient)).all()


@pytest.mark.parametrize("z", [-0.3, 0.4])
def test_kto(rng, z):
    x, reference = (np.float64(np.float32(-rng.uniform(0.5, 6, 6))) for _ in range(2))
    good = np.array([True, True, False, True, False, False])
    other = np.array([-1.0, -2.0, -0.5])
    found = preferences.kto_divergence(mx.array(other + z, dtype=mx.float32), mx.array(other, dtype=mx.float32))
    assert found.item() == pytest.approx(max(z, 0), abs=1e-6)

    def theirs(x):
        away = x - reference
        held = max(z, 0)
        return np.where(good, 1.2 * (1 - sigmoid(0.3 * (away - held))), 0.8 * (1 - sigmoid(0.3 * (held - away))))

    def ours(x):
        return preferences.kto_losses(
            x, mx.array(reference, dtype=mx.float32), mx.array(good), mx.array(max(z, 0.0)), beta=0.3,
            desirable_weight=1.2, undesirable_weight=0.8,
        )  # fmt: skip

    check(ours, theirs, x)


def test_no_gradient_flows_through_the_divergence_of_kto():
    def loss(x):
        z = preferences.kto_divergence(x, mx.array([-3.0, -3.0]))
        return preferences.kto_losses(mx.array([-1.0]), mx.array([-1.5]), mx.array([True]), z).sum()

    assert np.array(mx.grad(loss)(mx.array([-1.0, -2.0]))).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("estimate", "formula"),
    [("k1", lambda d: -d), ("k2", lambda d: d**2 / 2), ("k3", lambda d: np.exp(d) - 1 - d)],
)
def test_divergences(pairs, estimate, formula):
    x, reference, _ = pairs
    check(
        lambda x: policies.divergence(x, mx.array(reference, dtype=mx.float32), estimate),
        lambda x: formula(reference - x),
        x - 0.5 * (x - reference),
    )


def test_all_divergences_have_the_true_one_as_their_mean():
    policy, reference = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
    true = (policy * np.log(policy / reference)).sum()
    for estimate in ("k1", "k3"):
        each = policies.divergence(mx.log(mx.array(policy)), mx.log(mx.array(reference)), estimate)
        assert (policy * np.array(each)).sum() == pytest.approx(true, abs=1e-6)


@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28)])
def test_policies_are_clipped(rng, clip):
    old = np.float64(np.float32(-rng.uniform(0.5, 3, (4, 6))))
    x = np.float64(np.float32(old + rng.uniform(-0.6, 0.6, (4, 6))))
    gains = rng.normal(size=(4, 1))

    def theirs(x):
        ratio = np.exp(x - old)
        return -np.minimum(ratio * gains, np.clip(ratio, 1 - clip[0], 1 + clip[1]) * gains)

    def ours(x):
        arrays = (mx.array(array, dtype=mx.float32) for array in (old, gains))
        return policies.clipped_policy_losses(x, *arrays, clip_low=clip[0], clip_high=clip[1])

    check(ours, theirs, x)


def test_values_are_clipped(rng):
    old, returns = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    x = old + rng.uniform(-0.6, 0.6, (4, 6))

    def theirs(x):
        return np.maximum((x - returns) ** 2, (np.clip(x, old - 0.2, old + 0.2) - returns) ** 2) / 2

    check(
        lambda x: policies.clipped_value_losses(x, *(mx.array(a, dtype=mx.float32) for a in (old, returns)), clip=0.2),
        theirs,
        x,
    )


@pytest.mark.parametrize("normalisation", ["sequence", "token", "constant"])
def test_sums_of_tokens(rng, normalisation):
    losses, mask = rng.normal(size=(4, 6)), np.arange(6)[None] < np.array([[6], [1], [3], [0]])
    each = [losses[i][mask[i]] for i in range(4)]
    wanted = {
        "sequence": (sum(one.mean() for one in each if len(one)), 3),
        "token": (sum(one.sum() for one in each), 10),
        "constant": (sum(one.sum() for one in each) / 8, 4),
    }[normalisation]
    total, count = policies.summed(mx.array(losses, dtype=mx.float32), mx.array(mask), normalisation, 8)
    assert (total.item(), count.item()) == (pytest.approx(wanted[0], abs=1e-6), wanted[1])


def advantage_by_sum(rewards, values, gamma, lam):
    """Of one answer: the sum over k of (gamma * lam)^k times the k-th difference, written out."""
    values = [*values, 0.0]
    differences = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(len(rewards))]
    return [sum((gamma * lam) ** k * differences[t + k] for k in range(len(rewards) - t)) for t in range(len(rewards))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_generalised_advantages(rng, gamma, lam):
    spans = [(0, 6), (2, 5), (3, 4), (1, 6)]
    rewards, values = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    mask = np.zeros((4, 6), dtype=bool)
    for row, (first, last) in enumerate(spans):
        mask[row, first:last] = True
    found, returns = advantages.generalised_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for row, (first, last) in enumerate(spans):
        wanted = advantage_by_sum(rewards[row, first:last], values[row, first:last], gamma, lam)
        np.testing.assert_allclose(found[row, first:last], wanted, rtol=1e-12)
        np.testing.assert_allclose(returns[row, first:last], wanted + values[row, first:last], rtol=1e-12)
    assert not found[~mask].any()
    assert not returns[~mask].any()
    if lam == gamma == 1.0:  # then the returns are the sums of the rewards still to come
        np.testing.assert_allclose(returns[0], np.cumsum(rewards[0][::-1])[::-1], rtol=1e-10)


def test_rewards_of_tokens_and_whitening(rng):
    mask = np.array([[False, True, True, False], [True, False, False, False], [False] * 4])
    log_p, reference = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    found = advantages.token_rewards(np.array([2.0, -1.0, 5.0]), log_p, reference, mask, beta=0.1)
    each = -0.1 * (log_p - reference)
    np.testing.assert_allclose(found, [[0, each[0, 1], each[0, 2] + 2, 0], [each[1, 0] - 1, 0, 0, 0], [0] * 4])
    values = found[mask]
    white = advantages.whitened(found, mask)
    np.testing.assert_allclose(white[mask], (values - values.mean()) / np.sqrt(values.var() + 1e-8))
    shifted = advantages.whitened(found, mask, centred=False)
    np.testing.assert_allclose(shifted[mask].mean(), values.mean())
    np.testing.assert_allclose(shifted[mask].std(), 1, rtol=1e-6)
    assert advantages.whitened(np.array([[3.0, 0.0]]), np.array([[True, False]])).tolist() == [[3.0, 0.0]]


def test_advantages_in_groups():
    rewards = np.array([1.0, 0, 0, 1, 1, 1, 1, 1, 0.5, 2, 3, 0])
    found = advantages.group_advantages(rewards, 4)
    assert found[4:8].tolist() == [0] * 4
    np.testing.assert_allclose(found[:4], np.array([0.5, -0.5, -0.5, 0.5]) / (np.sqrt(1 / 3) + 1e-4))
    plain = advantages.group_advantages(rewards, 4, scaled=False)
    np.testing.assert_allclose(plain[8:], [-0.875, 0.625, 1.625, -1.375])
    lengths = np.array([10, 16, 18, 20, 25])
    assert advantages.overlong_penalties(lengths, longest=20, buffer=4).tolist() == [0, 0, -0.5, -1, -1]


def test_calibration():
    probabilities, right = np.array([0.95, 0.91, 0.55, 1.0]), np.array([True, False, True, True])
    wanted = 0.75 * abs((0.95 + 0.91 + 1.0) / 3 - 2 / 3) + 0.25 * abs(0.55 - 1)
    assert preferences.calibration_error(probabilities, right) == pytest.approx(wanted)


def of_trl(name):
    """The case's inputs as MLX arrays and numbers, its loss and its gradient."""
    case = CASES[name]
    inputs = {k: mx.array(v) if isinstance(v, list) else v for k, v in case["inputs"].items()}
    return inputs, case["loss"], np.array(case["gradient"])


def agrees(loss, leaf, wanted, gradient):
    found, mine = mx.value_and_grad(loss)(leaf)
    assert found.item() == pytest.approx(wanted, abs=1e-5)
    np.testing.assert_allclose(np.array(mine), gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_trl_has_the_same_dpo_and_ipo(name):
    given, wanted, gradient = of_trl(name)
    lengths = given["mask"].sum(1)

    def loss(leaf):
        # trl sums all columns of what the model gives; ours counts the answer's alone, so both are masked here.
        sums = leaf.sum(1)
        arguments = (sums[:3], sums[3:], given["reference"][:3], given["reference"][3:])
        if name == "ipo":
            means = {"chosen_lengths": lengths[:3], "rejected_lengths": lengths[3:]}
            return preferences.ipo_losses(*arguments, beta=given["beta"], **means).mean()
        return preferences.dpo_losses(*arguments, beta=given["beta"]).mean()

    agrees(loss, given["leaf"], wanted, gradient)


def test_trl_has_the_same_simpo_and_odds_ratios():
    one = mx.ones(5)
    given, wanted, gradient = of_trl("simpo")
    agrees(
        lambda leaf: preferences.simpo_losses(*leaf, one, one, beta=given["beta"], gamma=given["gamma"]).mean(),
        given["leaf"], wanted, gradient,
    )  # fmt: skip
    given, wanted, gradient = of_trl("orpo")
    agrees(
        lambda leaf: (given["beta"] * preferences.odds_ratio_losses(*leaf, one, one)).mean(),
        given["leaf"], wanted, gradient,
    )  # fmt: skip


def test_trl_has_the_same_kto():
    given, wanted, gradient = of_trl("kto")
    z = preferences.kto_divergence(given["other"], given["other_reference"])
    assert z.item() > 0

    def loss(leaf):
        return preferences.kto_losses(
            leaf.sum(1), given["reference"], given["desirable"], z, beta=given["beta"],
            desirable_weight=given["good"], undesirable_weight=given["bad"],
        ).mean()  # fmt: skip

    agrees(loss, given["leaf"], wanted, gradient)


@pytest.mark.parametrize(("name", "normalisation"), [("grpo", "sequence"), ("dr_grpo", "constant"), ("dapo", "token")])
def test_trl_has_the_same_grpo(name, normalisation):
    given, wanted, gradient = of_trl(name)

    def loss(leaf):
        each = policies.clipped_policy_losses(
            leaf, given["old"], given["advantages"][:, None], clip_low=given["low"], clip_high=given["high"]
        )
        each = each + given["beta"] * policies.divergence(leaf, given["reference"])
        total, count = policies.summed(each, given["mask"] == 1, normalisation, given["mask"].shape[1])
        return total / count

    agrees(loss, given["leaf"], wanted, gradient)
