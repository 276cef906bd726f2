"""Bits where they matter: how much a module's rounding costs, and the cheapest recipe of a size.

The loss of a model whose weights change by d grows, to second order, by d^T F d / 2, with F the Fisher information. Of
a linear module, F is taken as the product of two parts, K-FAC's (Martens and Grosse 2015, arXiv:1503.05671): the mean
of x x^T over its inputs, and of squared gradients for each output; of the table of tokens, as its diagonal, the mean of
squared gradients of single texts. A recipe of a given size then is a knapsack with one form for every module, which a
greedy walk along the lower convex hulls solves up to one step (Sinha and Zoltners 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.checkpoint import Quantization, dequantize
from mlxlm.conversion.calibration import check_language_model, gram_matrices, layer_inputs, losses
from mlxlm.conversion.quantizing import quantize
from mlxlm.conversion.recipes import Module, Recipe
from mlxlm.errors import UsageError
from mlxlm.models import Transformer

Said = Callable[[str], None]


def fisher(model: Transformer, paths: Iterable[str], rows: mx.array, say: Said | None = None) -> dict[str, mx.array]:
    """Mean squared gradients of the loss of single rows (B, L), by path and of the shape of each module's weight.

    paths: of modules with a float weight.  say: told about progress. Raises UsageError for other than language models.
    """
    check_language_model(model)
    names = [f"{path}.weight" for path in paths]
    own = dict(tree_flatten(model.parameters()))
    weights = {name: own[name] for name in names}

    def loss(weights: dict[str, mx.array], row: mx.array) -> mx.array:
        model.update(tree_unflatten(list(weights.items())))
        return losses(model, row)

    sums = {name: mx.zeros(weight.shape) for name, weight in weights.items()}
    gradient = mx.grad(loss)
    try:
        for number in range(rows.shape[0]):
            found = gradient(weights, rows[number : number + 1])
            for name in names:
                sums[name] = sums[name] + mx.square(found.pop(name).astype(mx.float32))
                mx.eval(sums[name])
            if say is not None:
                say(f"sensitivity: text {number + 1} of {rows.shape[0]}")
    finally:
        model.update(tree_unflatten(list(weights.items())))
    return {name.removesuffix(".weight"): total / rows.shape[0] for name, total in sums.items()}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A form that the modules stored as one could have.  cost: how much the loss is expected to grow.  nbytes: size."""

    form: Quantization
    cost: float
    nbytes: int


def costs(
    model: Transformer,
    modules: Iterable[Module],
    importance: Mapping[str, mx.array],
    forms: Iterable[Quantization],
    dtype: mx.Dtype,
    grams: Mapping[str, mx.array] | None = None,
    found: dict[str, dict[Quantization, Choice]] | None = None,
) -> dict[str, dict[Quantization, Choice]]:
    """By path on disk, every form that fits the rows of the modules there.

    importance: from `fisher`.  dtype: of scales, which sizes depend on.  grams: of the inputs of modules that have
    them, by path.  found: an earlier result to add to.
    """
    own = dict(tree_flatten(model.parameters()))
    found, grams = {} if found is None else found, grams or {}
    for module in modules:
        weight = own[f"{module.path}.weight"].astype(mx.float32)
        for form in forms:
            if module.shape[1] % form.group_size:
                continue
            packed = quantize(weight.astype(dtype), form)
            change = dequantize(*packed, form, mx.float32) - weight
            cost = _growth(change, importance[module.path], grams.get(module.path)).item()
            nbytes = sum(part.nbytes for part in packed if part is not None)
            here = found.setdefault(module.hub, {})
            before = here.get(form, Choice(form=form, cost=0.0, nbytes=0))
            here[form] = Choice(form=form, cost=before.cost + cost, nbytes=before.nbytes + nbytes)
    return found


def _growth(change: mx.array, importance: mx.array, gram: mx.array | None) -> mx.array:
    """How much the loss grows by a change of a weight (out, in), to second order."""
    if gram is None:
        return (mx.square(change) * importance).sum() / 2
    # importance is the mean of g^2 x^2: by output, its sum over inputs is that of g^2 times the trace of x x^T.
    outputs = importance.sum(axis=1) / mx.maximum(mx.trace(gram), 1e-30)
    return (outputs * ((change @ gram) * change).sum(axis=1)).sum() / 2


def _all_costs(
    model: Transformer,
    modules: list[Module],
    importance: Mapping[str, mx.array],
    forms: list[Quantization],
    dtype: mx.Dtype,
    rows: mx.array,
) -> dict[str, list[Choice]]:
    """`costs` of all modules, layer by layer, so that the inputs of one layer are in memory at once."""
    layers = [f"decoder.layers.{number}." for number in range(len(model.decoder.layers))]
    outside = [module for module in modules if not module.path.startswith("decoder.layers.")]
    found = costs(model, outside, importance, forms, dtype)
    inputs = layer_inputs(model, rows)
    for prefix, layer in zip(layers, model.decoder.layers, strict=True):
        grams = {prefix + path: gram for path, gram in gram_matrices(layer, inputs)[0].items()}
        here = [module for module in modules if module.path.startswith(prefix)]
        costs(model, here, importance, forms, dtype, grams, found)
        inputs = [(layer(x, scope, None, None), scope) for x, scope in inputs]
        mx.eval([x for x, _ in inputs])
    return {hub: list(choices.values()) for hub, choices in found.items()}


def allocate(choices: Mapping[str, list[Choice]], budget: int) -> dict[str, Choice]:
    """One choice for each path, of `budget` bytes together at most and of nearly the least cost.

    Raises UsageError when even the smallest choices are too large.
    """
    hulls = {hub: _hull(some) for hub, some in choices.items()}
    chosen = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].nbytes for hull in hulls.values())
    if spent > budget:
        raise UsageError(
            f"the target size leaves {budget / 1e6:.1f} MB for the modules, but they have {spent / 1e6:.1f} MB in the "
            "smallest form; ask for a larger one"
        )
    while True:
        steps = []
        for hub, place in chosen.items():
            if place + 1 < len(hulls[hub]):
                now, then = hulls[hub][place], hulls[hub][place + 1]
                if spent + then.nbytes - now.nbytes <= budget:
                    steps.append(((now.cost - then.cost) / (then.nbytes - now.nbytes), hub))
        if not steps:
            return {hub: hulls[hub][place] for hub, place in chosen.items()}
        _, best = max(steps)
        place = chosen[best]
        spent += hulls[best][place + 1].nbytes - hulls[best][place].nbytes
        chosen[best] += 1


def _hull(choices: list[Choice]) -> list[Choice]:
    """The choices that no mixture of two others beats, from small to large, each with less cost than the one before."""
    hull: list[Choice] = []
    for one in sorted(choices, key=lambda choice: (choice.nbytes, choice.cost)):
        if hull and (one.cost >= hull[-1].cost or one.nbytes == hull[-1].nbytes):
            continue
        while len(hull) > 1 and _slope(hull[-2], one) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(one)
    return hull


def _slope(small: Choice, large: Choice) -> float:
    return (small.cost - large.cost) / (large.nbytes - small.nbytes)


def sensitive_recipe(
    model: Transformer,
    modules: list[Module],
    rows: mx.array,
    *,
    total_bytes: int,
    forms: Iterable[Quantization],
    dtype: mx.Dtype,
    fixed: Recipe | None = None,
    say: Said | None = None,
) -> Recipe:
    """The recipe for which the loss on rows (B, L) is expected to grow least, of `total_bytes` weights in all.

    modules: all that can be quantized.  forms: to choose from.  dtype: of what stays float.  fixed: a recipe whose
    patterns and left out modules hold in any case; its default counts for nothing.
    Raises UsageError when the size can't be reached, and for other than language models.
    """
    fixed = fixed or Recipe(default=None)
    probe = Recipe(default=next(iter(forms)), layers=fixed.layers, embeddings=fixed.embeddings, head=fixed.head)
    named = {module.path: Recipe(default=None, layers=fixed.layers).form(module) for module in modules}
    free = [m for m in modules if named[m.path] is None and probe.form(m) is not None]
    importance = fisher(model, [module.path for module in free], rows, say)
    choices = _all_costs(model, free, importance, list(forms), dtype, rows)
    taken = sum(module.shape[0] * module.shape[1] for module in free if module.hub in choices)
    own = dict(tree_flatten(model.parameters()))
    rest = sum(array.size for array in own.values()) - taken
    other = rest * dtype.size - sum(_saved(module, form, dtype) for module in modules if (form := named[module.path]))
    chosen = allocate(choices, total_bytes - other)
    counts: dict[Quantization, int] = {}
    for choice in chosen.values():
        counts[choice.form] = counts.get(choice.form, 0) + 1
    default = max(counts, key=lambda form: counts[form], default=None)
    layers = [(hub, choice.form) for hub, choice in chosen.items() if choice.form != default]
    return Recipe(default=default, layers=(*fixed.layers, *layers), embeddings=fixed.embeddings, head=fixed.head)


def _saved(module: Module, form: Quantization, dtype: mx.Dtype) -> int:
    """Bytes that a module has less than as floats."""
    rows, columns = module.shape
    if columns % form.group_size:
        return 0
    scales = columns // form.group_size * (2 * dtype.size if form.has_biases else 1)
    return rows * (columns * dtype.size - columns * form.bits // 8 - scales)
