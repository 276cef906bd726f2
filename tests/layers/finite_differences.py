"""A module against a plain float64 formula: its output, and its gradients by finite differences of that formula."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers, the same for the same shape and seed."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def randomized(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module with all weights drawn anew, norms and biases too, so that a wrong term shows."""
    arrays = tree_flatten(module.parameters())
    drawn = [(name, mx.array(0.6 * normal(*a.shape, seed=seed + i))) for i, (name, a) in enumerate(arrays)]
    module.update(tree_unflatten([(name, array.astype(mx.float32)) for name, array in drawn]))
    return module.eval()


def numbers(module: nn.Module) -> dict[str, np.ndarray]:
    """The module's weights by name, float64."""
    return {name: np.array(array, dtype=np.float64) for name, array in tree_flatten(module.parameters())}


def assert_module_follows(
    module: nn.Module,
    call: Callable[..., mx.array],
    formula: Callable[..., np.ndarray],
    *inputs: np.ndarray,
    tolerance: float = 2e-4,
) -> None:
    """Output and every gradient, of weights and inputs, are those of the formula.

    call: (module, *inputs) -> array.  formula: (weights by name, *inputs) -> float64 array.
    """
    weights = numbers(module)
    given = weights | {f"input{i}": np.asarray(array, dtype=np.float64) for i, array in enumerate(inputs)}

    def value(values: dict[str, np.ndarray]) -> np.ndarray:
        return formula({name: values[name] for name in weights}, *(values[f"input{i}"] for i in range(len(inputs))))

    expected = value(given)
    found = np.array(call(module, *(mx.array(array.astype(np.float32)) for array in inputs)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
    cotangent = normal(*expected.shape, seed=99)

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        module.update(tree_unflatten([(name, arrays[name]) for name in weights]))
        out = call(module, *(arrays[f"input{i}"] for i in range(len(inputs))))
        return (out * mx.array(cotangent.astype(np.float32))).sum()

    gradients = mx.grad(loss)({name: mx.array(array.astype(np.float32)) for name, array in given.items()})
    step = 1e-5
    for name, array in given.items():
        numeric = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                moved[index] += sign * step
                ends.append((value({**given, name: moved}) * cotangent).sum())
            numeric[index] = (ends[0] - ends[1]) / (2 * step)
        error = np.abs(np.array(gradients[name]) - numeric).max()
        assert error < tolerance * max(1.0, np.abs(numeric).max()), f"gradient of {name}: {error}"
