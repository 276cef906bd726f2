"""The adapters of one model: put in, switched, weighted, taken out. The weights of the base are shared by all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxlm.errors import UsageError, nearest
from mlxlm.peft.method import Content, Method
from mlxlm.peft.places import Adapted, Added, at, bare, owner, put, wrapped

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


@dataclass
class Adapter:
    """One adapter of a model: its settings and what they put there."""

    name: str
    method: Method
    content: Content


class Adapters:
    """What `model.adapters` is: all adapters by name, and how much of each is active."""

    def __init__(self) -> None:
        self.known: dict[str, Adapter] = {}
        self.active: dict[str, float] = {}
        self.originals: dict[str, mx.array] = {}  # base parameters that active adapters have replaced


def adapters_of(model: Transformer) -> Adapters:
    """The adapters of a model, none at first."""
    found = getattr(model, "adapters", None)
    if found is None:
        found = model.adapters = Adapters()
    return found


def apply(
    model: Transformer, method: Method, *, name: str = "default", tokenizer: Tokenizer | None = None
) -> Transformer:
    """Put a fresh adapter into a model, in place, and make it the one that is active and trained; the model itself.

    Everything else is frozen.  name: of the adapter.  tokenizer: for methods that begin with a text.
    Raises UsageError for settings that don't fit the model.
    """
    add(model, name, method, method.content(model, tokenizer))
    activate(model, name, trainable=True)
    return model


def add(model: Transformer, name: str, method: Method, content: Content) -> None:
    """Put content into a model under a name, without making it active."""
    adapters = adapters_of(model)
    if not re.fullmatch(r"[\w-]+", name):
        raise UsageError(f"an adapter's name is made of letters, digits, - and _, not {name!r}")
    if name in adapters.known:
        raise UsageError(f"the model has an adapter {name!r} already; unload it or take another name")
    for path, part in content.parts.items():
        wrapped(model, path).adapters[name] = part
    for path, part in content.added.items():
        place = bare(at(model, path))
        if place.after is None:
            place.after = Added()
        place.after.adapters[name] = part
    for module in content.modules():
        module.freeze()
        module.train(model.training)
    adapters.known[name] = Adapter(name, method, content)


def activate(model: Transformer, names: str | Mapping[str, float] | None, *, trainable: bool = False) -> None:
    """Make one adapter active, or several with weights, or none; every other one rests.

    names: one name, weights by name, or None for the bare model. Of several the weighted changes are added up, in the
    order given where one is of what another gives out (IA3).
    trainable: whether the active ones are trained, and nothing else; default False, all frozen.
    Raises UsageError for an unknown name, and for combinations that have no meaning: weighted virtual tokens.
    """
    adapters = adapters_of(model)
    wanted = {names: 1.0} if isinstance(names, str) else dict(names or {})
    for name in wanted:
        _known(adapters, name)
    prompts = [name for name in wanted if adapters.known[name].content.prompt is not None]
    if len(prompts) > 1 or any(wanted[name] != 1 for name in prompts):
        raise UsageError(
            f"virtual tokens can't be weighted or added up: activate one of {', '.join(prompts)} by itself"
        )
    _keep_own(model, adapters)
    _set_own(model, adapters.originals)
    adapters.originals, adapters.active = {}, wanted
    for module in model.modules():
        if isinstance(module, (Adapted, Added)):
            module._active = tuple((name, weight) for name, weight in wanted.items() if name in module.adapters)
    model.prompt = adapters.known[prompts[0]].content.prompt if prompts else None
    _replace_own(model, adapters)
    model.freeze()
    if trainable:
        for name in wanted:
            _unfreeze(model, adapters.known[name].content)


def _known(adapters: Adapters, name: str) -> Adapter:
    if name not in adapters.known:
        hint = nearest(name, adapters.known) or "; it has none"
        raise UsageError(f"the model has no adapter {name!r}{hint}")
    return adapters.known[name]


def _keep_own(model: Transformer, adapters: Adapters) -> None:
    """Take the values that training may have changed back from the model."""
    if len(adapters.active) != 1 or set(adapters.active.values()) != {1.0}:
        return
    (name,) = adapters.active
    own = adapters.known[name].content.own
    for path in own:
        module, key = owner(model, path)
        own[path] = module[key]


def _set_own(model: Transformer, values: Mapping[str, mx.array]) -> None:
    for path, array in values.items():
        module, key = owner(model, path)
        module[key] = array


def _replace_own(model: Transformer, adapters: Adapters) -> None:
    for name, weight in adapters.active.items():
        for path, array in adapters.known[name].content.own.items():
            module, key = owner(model, path)
            original = adapters.originals.setdefault(path, module[key])
            if adapters.active == {name: 1.0}:
                # Alone and whole it is the very array, so that training goes on with it; `_keep_own` takes back what
                # comes of it, and nobody holds on to what it was.
                module[key] = array
                adapters.known[name].content.own[path] = original
            else:
                module[key] = module[key] + weight * (array - original)


def _unfreeze(model: Transformer, content: Content) -> None:
    for module in content.modules():
        module.unfreeze()
    for path in content.own:
        module, key = owner(model, path)
        module.unfreeze(recurse=False, keys=[key])


def unload(model: Transformer, name: str | None = None) -> Transformer:
    """Take an adapter out of the model, or all of them for None; the base is then what it was. The model itself."""
    adapters = adapters_of(model)
    for one in [*adapters.known] if name is None else [_known(adapters, name).name]:
        left = {other: weight for other, weight in adapters.active.items() if other != one}
        activate(model, left)
        content = adapters.known.pop(one).content
        for path in content.parts:
            wrapper = at(model, path)
            del wrapper.adapters[one]
            if not wrapper.adapters:
                put(model, path, wrapper.base)
        for path in content.added:
            place = bare(at(model, path))
            del place.after.adapters[one]
            if not place.after.adapters:
                place.after = None
    return model


def content_of(model: Transformer, name: str | None = None) -> Adapter:
    """An adapter with its present values; None stands for the one that is active, or the only one.

    Raises UsageError when there is none, or several of which none is meant.
    """
    adapters = adapters_of(model)
    if name is None:
        names = list(adapters.active or adapters.known)
        if len(names) != 1:
            raise UsageError(f"the model has {len(names) or 'no'} adapters: {', '.join(names) or 'apply one'}")
        (name,) = names
    adapter = _known(adapters, name)
    _keep_own(model, adapters)
    return adapter


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.  trainable: that are trained.  total: of the model with its adapters; a quantized weight
    counts as the numbers it stands for.
    """

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable by total."""
        return self.trainable / self.total


def count_parameters(model: Transformer) -> Counts:
    """How many parameters are trained, and how many there are."""
    trainable = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    total = 0
    for module in model.modules():
        bits = getattr(module, "bits", None)
        for key, array in module.items():
            if isinstance(array, mx.array) and not key.startswith("_") and not (bits and key in ("scales", "biases")):
                total += array.size * 32 // bits if bits and key == "weight" else array.size
    return Counts(trainable, total)
