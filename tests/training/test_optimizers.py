"""Optimizers against their papers' formulas, decay on matrices only, Muon on matrices of layers only."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as mlx_optimizers
import numpy as np
import pytest

from mlxlm.training import Optimizer, TrainSettings

NAMES = {
    "embeddings.token.weight": (6, 4),
    "decoder.layers.0.attention.query.weight": (4, 4),
    "decoder.layers.0.attention.query.bias": (4,),
    "decoder.norm.weight": (4,),
}
MATRIX = "decoder.layers.0.attention.query.weight"


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {name: mx.array(rng.normal(size=shape).astype(np.float32)) for name, shape in NAMES.items()}


def update(optimizer, gradients, parameters, rate, valid=True):
    optimizer.set_learning_rate(rate)
    return optimizer.apply(gradients, parameters, mx.array(valid))


def test_adamw_follows_its_formula_over_steps():
    settings = TrainSettings(steps=9, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-6)
    parameters = arrays(0)
    optimizer = Optimizer(settings, parameters)
    w = {name: np.array(array, dtype=np.float64) for name, array in parameters.items()}
    m, v = (dict.fromkeys(w, 0.0) for _ in range(2))
    for step in range(1, 5):
        gradients, rate = arrays(step), 0.1 / step
        parameters = update(optimizer, gradients, parameters, rate)
        for name in w:
            g = np.array(gradients[name], dtype=np.float64)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            decay = 0.1 if g.ndim == 2 else 0.0
            step_size = (m[name] / (1 - 0.8**step)) / (np.sqrt(v[name] / (1 - 0.9**step)) + 1e-6)
            w[name] = w[name] * (1 - rate * decay) - rate * step_size
            assert np.abs(np.array(parameters[name]) - w[name]).max() < 1e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_adamw_without_decay_is_mlxs_adam(dtype):
    parameters = {name: array.astype(dtype) for name, array in arrays(0).items()}
    theirs = mlx_optimizers.Adam(0.01, bias_correction=True)
    ours = Optimizer(TrainSettings(steps=9), parameters)
    mine = other = parameters
    for step in range(1, 4):
        gradients = {name: array.astype(dtype) for name, array in arrays(step).items()}
        mine, other = update(ours, gradients, mine, 0.01), theirs.apply_gradients(gradients, other)
    tolerance = 1e-6 if dtype == mx.float32 else 2e-2
    for name in parameters:
        assert mine[name].dtype == ours.state[0][name]["m"].dtype == dtype
        assert mx.allclose(mine[name].astype(mx.float32), other[name].astype(mx.float32), atol=tolerance).item()


def test_an_update_that_must_not_happen_leaves_adamws_bits():
    settings, bad = TrainSettings(steps=9, weight_decay=0.1), arrays(2)
    bad[MATRIX] = bad[MATRIX] * mx.inf
    for first in (True, False):
        parameters, optimizer = arrays(0), Optimizer(settings, arrays(0))
        if not first:
            parameters = update(optimizer, arrays(1), parameters, 0.01)
        before = {name: np.array(array) for name, array in optimizer.arrays().items() if "rate" not in name}
        after = update(optimizer, bad, parameters, 0.01, valid=False)
        assert all(np.array_equal(after[name], parameters[name]) for name in parameters)
        assert all(np.array_equal(optimizer.arrays()[name], array) for name, array in before.items())


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_weights_decay_in_matrices_only(name):
    """What decay adds to an update is rate * decay * weight for matrices and nothing for vectors."""
    updated = []
    for decay in (0.0, 0.5):
        parameters = arrays(0)
        optimizer = Optimizer(TrainSettings(steps=2, optimizer=name, weight_decay=decay), parameters)
        updated.append(update(optimizer, arrays(1), parameters, 0.01))
    for key, array in arrays(0).items():
        difference = np.array(updated[0][key]) - np.array(updated[1][key])
        expected = 0.01 * 0.5 * np.array(array) if array.ndim == 2 else np.zeros(array.shape)
        assert np.abs(difference - expected).max() < 1e-6, key


def test_lion_and_sgd_take_the_steps_of_their_papers():
    parameters, gradients = arrays(0), arrays(1)
    lion = Optimizer(TrainSettings(steps=2, optimizer="lion"), parameters)
    sgd = Optimizer(TrainSettings(steps=2, optimizer="sgd", momentum=0.5), parameters)
    moved = update(lion, gradients, parameters, 0.1)
    assert np.allclose(moved[MATRIX], np.array(parameters[MATRIX]) - 0.1 * np.sign(gradients[MATRIX]), atol=1e-6)
    once = update(sgd, gradients, parameters, 0.1)
    twice = update(sgd, gradients, once, 0.1)
    assert np.allclose(twice[MATRIX], np.array(parameters[MATRIX]) - 0.25 * np.array(gradients[MATRIX]), atol=1e-6)


def test_adafactor_follows_its_formula_over_steps():
    """Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5: squares of matrices kept by rows and columns, an
    update of at most root mean square 1, a step of the learning rate that is given.
    """
    parameters = arrays(0)
    optimizer = Optimizer(TrainSettings(steps=9, optimizer="adafactor"), parameters)
    w = {name: np.array(array, dtype=np.float64) for name, array in parameters.items()}
    rows, columns, whole = (dict.fromkeys(w, 0.0) for _ in range(3))
    for step in range(1, 5):
        gradients, kept = arrays(step), 1.0 - step**-0.8
        parameters = update(optimizer, gradients, parameters, 0.1)
        for name in w:
            g = np.array(gradients[name], dtype=np.float64)
            squares = g * g + 1e-30
            if g.ndim == 2:
                rows[name] = kept * rows[name] + (1 - kept) * squares.mean(1)
                columns[name] = kept * columns[name] + (1 - kept) * squares.mean(0)
                estimate = np.outer(rows[name], columns[name]) / rows[name].mean()
            else:
                whole[name] = estimate = kept * whole[name] + (1 - kept) * squares
            change = g / np.sqrt(estimate)
            w[name] = w[name] - 0.1 * change / max(1.0, np.sqrt((change * change).mean()))
            assert np.abs(np.array(parameters[name]) - w[name]).max() < 1e-5, name


def test_muon_makes_the_update_of_a_layers_matrix_orthogonal_and_leaves_the_rest_to_adamw():
    parameters, gradients = arrays(0), arrays(1)
    muon = Optimizer(TrainSettings(steps=2, optimizer="muon"), parameters)
    adamw = Optimizer(TrainSettings(steps=2, optimizer="adamw"), parameters)
    moved, other = update(muon, gradients, parameters, 0.1), update(adamw, gradients, parameters, 0.1)
    change = (np.array(parameters[MATRIX]) - np.array(moved[MATRIX])) / 0.1
    singular = np.linalg.svd(change, compute_uv=False)
    assert ((singular > 0.5) & (singular < 1.5)).all()
    for name in NAMES:
        assert np.array_equal(moved[name], other[name]) == (name != MATRIX), name


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_an_invalid_update_leaves_parameters_and_state_alone(name):
    parameters = arrays(0)
    optimizer = Optimizer(TrainSettings(steps=2, optimizer=name, weight_decay=0.1), parameters)
    parameters = update(optimizer, arrays(1), parameters, 0.1)
    before = {key: np.array(array) for key, array in optimizer.arrays().items()}
    broken = {key: mx.full(array.shape, mx.nan) for key, array in parameters.items()}
    after = update(optimizer, broken, parameters, 0.1, valid=False)
    assert all(mx.array_equal(after[key], parameters[key]) for key in parameters)
    assert all(np.array_equal(array, before[key]) for key, array in optimizer.arrays().items())
