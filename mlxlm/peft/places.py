"""Places in a model where adapters go: wrappers around modules, and modules by canonical or hub name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn

from mlxlm.errors import UsageError, WeightsError, nearest
from mlxlm.models.weights import hub_name

if TYPE_CHECKING:
    from mlxlm.models import Transformer

LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
_LAYER = re.compile(r"\b(encoder|decoder)\.layers\.(\d+)\.")


class Part(nn.Module):
    """What one adapter does at one place: changes the input, adds to the output, or both. Here neither.

    weight: how much of the adapter is wanted, 1 for all of it.
    """

    def prepare(self, x: mx.array, weight: float) -> mx.array:
        """The input that the base module is given instead of x."""
        return x

    def add(self, x: mx.array, y: mx.array, base: nn.Module | None, weight: float) -> mx.array:
        """The output instead of y = base(x)."""
        return y

    def whole(self, x: mx.array, base: nn.Module, weight: float) -> mx.array | None:
        """What `prepare`, the base and `add` give one after another, where it takes fewer operations at once."""
        return None


class Adapted(nn.Module):
    """A module with the parts of any number of adapters, of which the active ones act, one after another.

    base: the module as it was.  adapters: parts by the adapter's name.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters: dict[str, Part] = {}
        self._active: tuple[tuple[str, float], ...] = ()

    def __call__(self, x: mx.array, *rest: Any) -> mx.array:
        """What base(x, *rest) gives, changed by the active adapters."""
        parts = [(self.adapters[name], weight) for name, weight in self._active]
        if len(parts) == 1 and not rest:
            found = parts[0][0].whole(x, self.base, parts[0][1])
            if found is not None:
                return found
        for part, weight in parts:
            x = part.prepare(x, weight)
        y = self.base(x, *rest)
        for part, weight in parts:
            y = part.add(x, y, self.base, weight)
        return y

    def join(self) -> None:
        """Join the projections of the base, where it has some, see `mlxlm.layers.joined`."""
        self.base.join()


class AdaptedEmbedding(Adapted):
    """An `Adapted` token table; as the output matrix of a tied head it stays what it was, as in other libraries."""

    @property
    def weight(self) -> mx.array:
        """The table itself."""
        return self.base.weight

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits by the table itself."""
        return self.base.as_linear(x)


class Added(nn.Module):
    """What adapters add to a residual sum (see `Residual`): the sum of the active parts, each a function of x."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, Part] = {}
        self._active: tuple[tuple[str, float], ...] = ()

    def __call__(self, x: mx.array) -> mx.array:
        total = mx.zeros_like(x)
        for name, weight in self._active:
            total = self.adapters[name].add(x, total, None, weight)
        return total


def bare(module: Any) -> Any:
    """The module under any wrappers."""
    while isinstance(module, Adapted):
        module = module.base
    return module


def at(model: nn.Module, path: str) -> Any:
    """The module at a canonical path, with its wrappers. Raises UsageError when there is none."""
    node: Any = model
    for step in path.split("."):
        node = bare(node)
        try:
            node = node[int(step)] if isinstance(node, (list, tuple)) else getattr(node, step)
        except (AttributeError, IndexError, ValueError):
            raise UsageError(
                f"the model has no {path}; an adapter that names it was made for another model (see --model)"
            ) from None
    return node


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a canonical path."""
    parent, _, name = path.rpartition(".")
    setattr(bare(at(model, parent)) if parent else model, name, module)


def wrapped(model: nn.Module, path: str) -> Adapted:
    """The wrapper of the module at a path, made if there is none yet."""
    module = at(model, path)
    if not isinstance(module, Adapted):
        kind = AdaptedEmbedding if isinstance(module, EMBEDDING) else Adapted
        module = kind(module)
        put(model, path, module)
    return module


def owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The bare module that holds a parameter, given by its canonical name, and the parameter's name there."""
    parent, _, name = parameter.rpartition(".")
    return bare(at(model, parent)) if parent else model, name


def canonical(path: str) -> str | None:
    """The canonical path behind one in a model with wrappers; None for what belongs to adapters."""
    if ".adapters." in f".{path}." or path.startswith("prompt") or ".after." in f".{path}.":
        return None
    return ".".join(step for step in path.split(".") if step != "base")


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Bare modules by canonical path, in the order of the stack."""
    found = []
    for path, module in model.named_modules():
        name = canonical(path)
        if name and not isinstance(module, (Adapted, Added)):
            found.append((name, module))
    return iter(sorted(found, key=lambda item: _order(item[0])))


def _order(path: str) -> list[tuple[int, str]]:
    return [(int(step), "") if step.isdigit() else (-1, step) for step in path.split(".")]


def base_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The arrays of the base model by canonical name."""
    from mlx.utils import tree_flatten

    pairs = ((canonical(name), array) for name, array in tree_flatten(model.parameters()))
    return {name: array for name, array in pairs if name is not None}


def input_dim(module: nn.Module) -> int:
    """Features that a linear layer takes."""
    width = module.weight.shape[1]
    return width * 32 // module.bits if isinstance(module, nn.QuantizedLinear) else width


def layer_of(path: str) -> tuple[str, int] | None:
    """The stack and the number of the layer that a path leads into."""
    found = _LAYER.search(path + ".")
    return (found[1], int(found[2])) if found else None


def rules_of(model: Transformer, layout: str = "hub") -> tuple[Any, ...]:
    """The weight rules of the family that a model was loaded as; none for a model of no known origin."""
    source = getattr(model, "source", None)
    return () if source is None else source.family.rules(model.config, layout)


def hub_path(rules: tuple[Any, ...], path: str) -> str | None:
    """A module's path on disk, None where no rule knows it."""
    try:
        return hub_name(rules, f"{path}.weight").removesuffix(".weight")
    except WeightsError:
        return None


def in_layers(model: Transformer, path: str, layers: int | Sequence[int | str] | None) -> bool:
    """Whether a path is in the wanted layers: the last n of its stack, those of the numbers given, or any for None.

    A name such as "decoder.0" stands for the layer of one stack alone.
    """
    place = layer_of(path)
    if layers is None or place is None:
        return layers is None
    count = len(getattr(model.config, place[0]).layers)
    if isinstance(layers, int):
        return place[1] >= count - layers
    return place[1] in layers or f"{place[0]}.{place[1]}" in layers


def fits(target: str, names: Iterable[str | None]) -> bool:
    """Whether a target is one of the names, the end of one (at a dot), or a regular expression for a whole one."""
    for name in names:
        if name is not None and (name == target or name.endswith("." + target)):
            return True
    if not re.search(r"[\\*+?()\[\]|^$]", target):
        return False
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise UsageError(f"target {target!r} is no regular expression: {error}") from None
    return any(name is not None and pattern.fullmatch(name) for name in names)


def matching(
    model: Transformer,
    targets: Sequence[str],
    *,
    kinds: tuple[type, ...] = LINEAR,
    layers: int | Sequence[int | str] | None = None,
    keep: Callable[[str], bool] = lambda path: True,
) -> list[str]:
    """Canonical paths of the modules that targets name, in the order of the stack.

    targets: canonical or hub names, their ends, or regular expressions; "all-linear" is every linear layer of the
    stacks.  kinds: classes of modules.  layers: see `in_layers`.  Raises UsageError for a target that names nothing.
    """
    rules = rules_of(model)
    modules = [(path, hub_path(rules, path)) for path, module in base_modules(model) if isinstance(module, kinds)]
    modules = [(path, hub) for path, hub in modules if keep(path)]
    chosen: dict[str, None] = {}
    for target in targets:
        if target == "all-linear":
            found = [path for path, _ in modules if layer_of(path) and isinstance(bare(at(model, path)), LINEAR)]
        else:
            found = [path for path, hub in modules if fits(target, (path, hub))]
        if not found:
            names = {".".join(path.split(".")[-2:]) for path, _ in modules}
            names |= {hub.split(".")[-1] for _, hub in modules if hub}
            raise UsageError(f"no layer of this model is called {target!r}{nearest(target, names)}")
        chosen.update(dict.fromkeys(path for path in found if in_layers(model, path, layers)))
    if not chosen:
        raise UsageError(f"none of the layers {layers} has a module called {' or '.join(map(repr, targets))}")
    return sorted(chosen, key=_order)
