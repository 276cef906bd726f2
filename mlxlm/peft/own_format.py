"""Adapters that no other library has a form for: settings of the method, and tensors by canonical names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.errors import ConfigError, WeightsError, listing, nearest
from mlxlm.peft.method import Content, Method
from mlxlm.peft.methods import METHODS

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.peft.adapters import Adapter


def _named(content: Content) -> dict[str, Any]:
    """The modules of an adapter by the name under which their tensors are kept."""
    modules = {f"parts.{path}": part for path, part in content.parts.items()}
    modules |= {f"added.{path}": part for path, part in content.added.items()}
    return modules | ({} if content.prompt is None else {"prompt": content.prompt})


def read_own(model: Transformer, values: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> tuple[Method, Content]:
    """The adapter of a folder.  values: of adapter_config.json.  tensors: by name.

    Raises ConfigError for unknown methods or settings, WeightsError for tensors that don't fit the model.
    """
    name, settings = values.get("method"), values.get("settings", {})
    if name not in METHODS:
        raise ConfigError(f"adapter_config.json: unknown method {name!r}{nearest(str(name), METHODS)}")
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    unknown = [key for key in settings if key not in fields]
    if unknown:
        raise ConfigError(f"adapter_config.json: {name} has no settings {listing(unknown)}")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    method = METHODS[name](**settings)
    begun = {"init": "random", "text": None} if "init" in fields else {}
    content = dataclasses.replace(method, **begun).content(model)  # the text has served its purpose
    left = dict(tensors)
    wrong = []
    for where, module in _named(content).items():
        given = []
        for key, array in tree_flatten(module.parameters()):
            tensor = left.pop(f"{where}.{key}", None)
            if tensor is None or tensor.shape != array.shape:
                wrong.append(f"{where}.{key}")
            else:
                given.append((key, tensor))
        module.update(tree_unflatten(given))
    for key, array in content.own.items():
        tensor = left.pop(f"own.{key}", None)
        if tensor is None or tensor.shape != array.shape:
            wrong.append(f"own.{key}")
        else:
            content.own[key] = tensor.astype(array.dtype)
    if wrong or left:
        raise WeightsError(f"the adapter's tensors don't fit the model: {listing([*wrong, *left])}")
    return method, content


def write_own(model: Transformer, adapter: Adapter) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """adapter_config.json and the tensors of any adapter."""
    method, content = adapter.method, adapter.content
    settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    tensors = {
        f"{where}.{key}": array
        for where, module in _named(content).items()
        for key, array in tree_flatten(module.parameters())
    }
    tensors |= {f"own.{key}": array for key, array in content.own.items()}
    return {"format": "mlxlm", "method": method.name, "settings": settings}, tensors
