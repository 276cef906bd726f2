"""Which module gets how many bits: recipes, and the modules that they are for."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx import nn

from mlxlm.checkpoint import Quantization, read_json
from mlxlm.errors import UsageError, listing
from mlxlm.models import Transformer, TransformerConfig
from mlxlm.models.weights import Rule, hub_name

_TABLE = "embeddings.token"
_HEAD = "head."
_RULE = re.compile(r"(?P<pattern>[^=]+)=(?P<form>[^=]+)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the modules of a model are quantized.

    default: of every module that nothing else is said about, None: not at all.  layers: (pattern, quantization or None)
    in order, the first that fits counts; a pattern is a module path on disk with * and ?, such as "*.down_proj".
    embeddings, head: whether the table of tokens and the head are quantized when no pattern names them, default True;
    a tied head is its table.
    """

    default: Quantization | None
    layers: tuple[tuple[str, Quantization | None], ...] = ()
    embeddings: bool = True
    head: bool = True

    def form(self, module: Module) -> Quantization | None:
        """The quantization of a module, None when it stays as it is."""
        for pattern, form in self.layers:
            if fnmatch.fnmatchcase(module.hub, pattern):
                return form
        left_out = (module.table and not self.embeddings) or (module.head and not self.head)
        return None if left_out else self.default

    def forms(self, modules: Iterable[Module]) -> dict[str, Quantization]:
        """Canonical path -> quantization of the modules that get one.

        Modules whose rows don't divide into groups stay as they are. Raises UsageError for patterns that fit no module.
        """
        modules = list(modules)
        unused = [
            pattern
            for pattern, _ in self.layers
            if not any(fnmatch.fnmatchcase(module.hub, pattern) for module in modules)
        ]
        if unused:
            examples = listing(sorted({module.hub for module in modules}), 3)
            raise UsageError(f"no module is named {listing(map(repr, unused))}; modules are named such as {examples}")
        chosen = {module.path: (self.form(module), module) for module in modules}
        return {
            path: form
            for path, (form, module) in chosen.items()
            if form is not None and module.shape[1] % form.group_size == 0
        }


@dataclass(frozen=True)
class Module:
    """A module that can be quantized.

    path: canonical.  hub: its path on disk, which modules that are stored as one share.  shape: (out, in) of its
    weight.  table: it is the table of tokens.  head: it belongs to the head.
    """

    path: str
    hub: str
    shape: tuple[int, int]
    table: bool = field(default=False)
    head: bool = field(default=False)


def quantizable(config: TransformerConfig, rules: tuple[Rule, ...]) -> list[Module]:
    """All linear modules and the table of tokens, in the order of the model.  rules: of the names on disk."""
    model = Transformer(config)  # its random weights are never computed
    found = []
    for path, module in model.named_modules():
        if type(module) is nn.Linear or (type(module) is nn.Embedding and path == _TABLE):
            hub = hub_name(rules, f"{path}.weight").removesuffix(".weight")
            shape = tuple(module.weight.shape)
            found.append(Module(path, hub, shape, table=path == _TABLE, head=path.startswith(_HEAD)))
    order = {name: place for place, name in enumerate(_parameter_order(model))}
    return sorted(found, key=lambda one: order[f"{one.path}.weight"])


def _parameter_order(model: Transformer) -> list[str]:
    from mlx.utils import tree_flatten

    return [name for name, _ in tree_flatten(model.parameters())]


def parse_form(text: Any, where: str) -> Quantization | None:
    """A quantization from "4", "4:32", "4:32:affine", "mxfp4" or "none"; from JSON also a number, null or an object.

    Groups are of 64 where nothing is said (of the mode's own size in the modes of small floats).
    Raises UsageError for anything else, ConfigError for what MLX doesn't have.
    """
    if text is None or text == "none":
        return None
    if isinstance(text, Mapping):
        keys = dict(text)
        form = quantization(keys.pop("bits", None), keys.pop("group_size", None), keys.pop("mode", None))
        if keys:
            raise UsageError(f"{where}: unknown keys {listing(sorted(keys))}; known: bits, group_size, mode")
        return form
    bits, _, rest = str(text).partition(":")
    group, _, mode = rest.partition(":")
    if bits in ("mxfp4", "mxfp8", "nvfp4") and not rest:
        return quantization(None, None, bits)
    if not bits.isdecimal() or (group and not group.isdecimal()):
        raise UsageError(f"{where}: {text!r} is not BITS, BITS:GROUP_SIZE, BITS:GROUP_SIZE:MODE, a mode, or none")
    return quantization(int(bits), int(group) if group else None, mode or None)


def quantization(bits: int | None = None, group_size: int | None = None, mode: str | None = None) -> Quantization:
    """What is given, and MLX's defaults of the mode for the rest. Raises ConfigError for what MLX doesn't have."""
    mode = mode or "affine"
    defaults = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}.get(mode, (4, 64))
    return Quantization(defaults[0] if bits is None else bits, defaults[1] if group_size is None else group_size, mode)


def parse_layer(text: str) -> tuple[str, Quantization | None]:
    """One entry of `Recipe.layers` from "PATTERN=FORM". Raises UsageError."""
    match = _RULE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not PATTERN=BITS, as '*.down_proj=6' or 'model.embed_tokens=none'")
    return match["pattern"], parse_form(match["form"], repr(text))


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from a JSON file {"default": FORM, "layers": {PATTERN: FORM, ...}, "embeddings": true, "head": true}.

    Raises CheckpointError for a file that is no JSON, UsageError for unknown keys and forms.
    """
    values = read_json(path)
    unknown = values.keys() - {"default", "layers", "embeddings", "head"}
    layers, flags = values.get("layers", {}), [values.get(key, True) for key in ("embeddings", "head")]
    if unknown or not isinstance(layers, dict) or not all(isinstance(flag, bool) for flag in flags):
        raise UsageError(f"{path}: a recipe has default, layers (an object), embeddings and head (true or false)")
    return Recipe(
        default=parse_form(values.get("default"), f"{path}, default"),
        layers=tuple((pattern, parse_form(form, f"{path}, {pattern}")) for pattern, form in layers.items()),
        embeddings=flags[0],
        head=flags[1],
    )


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """What `read_recipe` reads back."""
    return {
        "default": None if recipe.default is None else recipe.default.to_json(),
        "layers": {pattern: None if form is None else form.to_json() for pattern, form in recipe.layers},
        "embeddings": recipe.embeddings,
        "head": recipe.head,
    }
