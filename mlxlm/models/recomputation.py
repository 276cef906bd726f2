"""Activations that are computed again for the gradients instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

Function = Callable[..., mx.array]


# Runs a function of arrays on copies of them, where nothing is being differentiated, and gives what it made, evaluated.
Aside = Callable[[Callable[..., list[mx.array]], Sequence[mx.array]], list[mx.array]]


def recomputed(function: Function, aside: Aside | None = None) -> Function:
    """`function` of trees of arrays (None for what is missing), of which nothing but the arguments is kept for the
    gradients (Chen et al. 2016, arXiv:1604.06174). All that gradients flow to must be an argument.

    Unlike `mx.checkpoint` it hands no gradient on before all of them are made. Otherwise those of weights, for which
    nothing in the backward pass waits, are put off, and what they need stays alive with what the next layer needs:
    four arrays of the feed-forward's width more where its matrices are trained.

    aside: what runs it and its gradients, by themselves, where it evaluates arrays on the way, which otherwise stay.
    """

    def call(*arguments: Any) -> mx.array:
        leaves = [(path, leaf) for path, leaf in tree_flatten(list(arguments)) if leaf is not None]
        paths = [path for path, _ in leaves]
        missing = [(path, None) for path, leaf in tree_flatten(list(arguments)) if leaf is None]

        def flat(arrays: Sequence[mx.array]) -> mx.array:
            tree = tree_unflatten([*zip(paths, arrays, strict=True), *missing])
            filled = [tree[i] if i < len(tree) else {} for i in range(len(arguments))]
            return function(*({} if a == {} else f for a, f in zip(arguments, filled, strict=True)))

        @mx.custom_function
        def run(*arrays: mx.array) -> mx.array:
            return flat(arrays) if aside is None else aside(lambda *copies: [flat(copies)], arrays)[0]

        @run.vjp
        def run_vjp(arrays: Any, cotangent: mx.array, _: mx.array) -> Any:
            arrays = [arrays] if isinstance(arrays, mx.array) else list(arrays)
            smooth = [i for i, array in enumerate(arrays) if mx.issubdtype(array.dtype, mx.floating)]
            if aside is None:
                gradients = gradients_of(smooth, arrays, cotangent)
            else:
                gradients = aside(lambda *copies: gradients_of(smooth, copies[:-1], copies[-1]), [*arrays, cotangent])
            all_of_them = [mx.zeros_like(array) for array in arrays]
            for i, gradient in zip(smooth, gradients, strict=True):
                all_of_them[i] = gradient
            return all_of_them[0] if len(all_of_them) == 1 else tuple(all_of_them)

        def gradients_of(smooth: Sequence[int], arrays: Sequence[mx.array], cotangent: mx.array) -> list[mx.array]:
            # Not before the gradient of the result is there.
            arrays = mx.depends(list(arrays), [cotangent])

            def of_smooth(*given: mx.array) -> mx.array:
                whole = list(arrays)
                for i, array in zip(smooth, given, strict=True):
                    whole[i] = array
                return flat(whole)

            _, gradients = mx.vjp(of_smooth, [arrays[i] for i in smooth], [cotangent])
            return mx.depends(gradients, gradients)

        return run(*(leaf for _, leaf in leaves))

    return call


def drops(module: nn.Module) -> bool:
    """Whether a module leaves things out at random while it trains."""
    rates = [
        1 - m._p_1 if isinstance(m, nn.Dropout) else getattr(getattr(m, "spec", None), "dropout", 0)
        for m in module.modules()
    ]
    return module.training and any(rate > 0 for rate in rates)


def drawn_key(module: nn.Module) -> mx.array | None:
    """A random state for what a module draws in both computations, None for one that draws nothing."""
    return mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) if drops(module) else None


@contextmanager
def chance(key: mx.array | None) -> Iterator[None]:
    """`key` as the random state for a while, for the same dropout in both computations; None changes nothing."""
    if key is None:
        yield
        return
    state = mx.random.state[0]
    before, state[:] = mx.array(state), mx.stop_gradient(key)
    yield
    state[:] = before


def arrays_within(thing: Any) -> Iterator[mx.array]:
    """All arrays in a module, those that are no parameters among them, or in a tree of dataclasses."""
    if isinstance(thing, mx.array):
        yield thing
    elif isinstance(thing, nn.Module):
        for module in thing.modules():
            yield from (value for value in module.values() if isinstance(value, mx.array))
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from arrays_within(getattr(thing, field.name))
