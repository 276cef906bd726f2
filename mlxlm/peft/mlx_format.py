"""Adapters as mlx-lm keeps them: adapter_config.json and adapters.safetensors, in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.errors import ConfigError, UsageError, WeightsError, listing
from mlxlm.models.weights import to_canonical, to_hub
from mlxlm.peft.fused import joined_lora, module_on_disk, modules_of, split_lora
from mlxlm.peft.lora import Dora, Lora, LoraEmbeddingPart, LoraPart
from mlxlm.peft.method import Content, Method
from mlxlm.peft.places import EMBEDDING, at, bare, base_parameters, input_dim, layer_of, rules_of
from mlxlm.peft.selective import Full

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.peft.adapters import Adapter

_PIECE = re.compile(r"(.+)\.(lora_a|lora_b|m)")


def read_mlx(model: Transformer, values: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> tuple[Method, Content]:
    """The adapter that an mlx-lm folder holds.  values: of adapter_config.json.  tensors: by their names on disk.

    Raises ConfigError for settings that aren't implemented, WeightsError for tensors that don't fit the model.
    """
    kind = values.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise ConfigError(f"adapter_config.json: fine_tune_type is 'lora', 'dora' or 'full', not {kind!r}")
    rules = _rules(model)
    if kind == "full":
        return Full(), Content(own=_own(model, rules, tensors))
    settings = values.get("lora_parameters")
    if not isinstance(settings, Mapping) or "scale" not in settings or "rank" not in settings:
        raise ConfigError("adapter_config.json: lora_parameters with rank and scale are missing")
    foreign = [key for key in settings if key not in ("rank", "scale", "dropout", "keys")]
    if foreign:
        raise ConfigError(f"adapter_config.json: lora_parameters that are not implemented: {listing(foreign)}")
    pieces: dict[str, dict[str, mx.array]] = {}
    for name, array in tensors.items():
        found = _PIECE.fullmatch(name)
        if not found:
            raise WeightsError(f"the adapter has a tensor {name}, which is none of lora_a, lora_b and m")
        pieces.setdefault(found[1], {})[found[2]] = array.astype(mx.float32)
    content, rank, scale = Content(), settings["rank"], settings["scale"]
    dropout = settings.get("dropout") or 0.0
    for hub, arrays in pieces.items():
        module = module_on_disk(rules, hub)
        base = [bare(at(model, path)) for path in module.paths]
        wide = model.config.embeddings.vocab_size if isinstance(base[0], EMBEDDING) else input_dim(base[0])
        out = model.config.dim if isinstance(base[0], EMBEDDING) else sum(part.weight.shape[0] for part in base)
        shapes = {"lora_a": (wide, rank), "lora_b": (rank, out)} | ({"m": (out,)} if kind == "dora" else {})
        found = {name: array.shape for name, array in arrays.items()}
        if found != shapes:
            raise WeightsError(f"{hub}: the adapter has {found}, expected {shapes}")
        lora_a, lora_b = arrays["lora_a"].T, arrays["lora_b"].T
        if isinstance(base[0], EMBEDDING):
            if kind == "dora":
                raise ConfigError(
                    f"{hub}: DoRA of embeddings with magnitudes by row, as mlx-lm has it, is not implemented"
                )
            content.parts[module.paths[0]] = LoraEmbeddingPart(lora_a, lora_b, scale)
        else:
            content.parts.update(split_lora(module, lora_a, lora_b, scale, dropout, arrays.get("m")))
    method = (Dora if kind == "dora" else Lora)(rank=rank, alpha=scale * rank, dropout=dropout)
    return method, content


def _rules(model: Transformer) -> tuple[Any, ...]:
    rules = rules_of(model, "mlx")
    if not rules:
        raise UsageError("this model was not loaded from a checkpoint, so nothing says what its modules are called")
    return rules


def _own(model: Transformer, rules: tuple[Any, ...], tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    translation, have = to_canonical(rules, tensors), base_parameters(model)
    wrong = translation.unexpected + [
        translation.origins[name]
        for name, array in translation.tensors.items()
        if name not in have or have[name].shape != array.shape
    ]
    if wrong:
        raise WeightsError(f"the adapter has tensors that don't fit the model: {listing(wrong)}")
    return {name: array.astype(have[name].dtype) for name, array in translation.tensors.items()}


def write_mlx(model: Transformer, adapter: Adapter) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """adapter_config.json and the tensors of an adapter: LoRA, DoRA, or parameters trained as they are ("full").

    mlx-lm has one rank and one scale for all modules: smaller ranks are filled with zeros, other scales go into B.
    Raises UsageError for an adapter that mlx-lm has no form for.
    """
    content, rules = adapter.content, _rules(model)
    depth = len(model.config.stack.layers)
    if (
        content.added
        or content.prompt
        or not {type(p) for p in content.parts.values()} <= {LoraPart, LoraEmbeddingPart}
    ):
        raise UsageError(f"mlx-lm has no form for {adapter.method.name}; use another layout")
    if content.own and content.parts:
        raise UsageError("mlx-lm has no form for LoRA with modules trained as a whole; use layout 'peft'")
    if not content.parts:
        return {"fine_tune_type": "full", "num_layers": depth}, to_hub(rules, _whole_groups(model, rules, content.own))
    changes = {}
    for module in modules_of(rules, list(content.parts)):
        part = content.parts.get(module.paths[0])
        if isinstance(part, LoraEmbeddingPart):
            if "magnitude" in part:
                raise UsageError("mlx-lm's DoRA of embeddings has other magnitudes, by row; use layout 'peft'")
            changes[module.hub] = (part.lora_a, part.lora_b, part.scale, None)
        else:
            whole = joined_lora(model, module, content.parts)
            changes[module.hub] = (whole.lora_a, whole.lora_b, whole.scale, whole.magnitude)
    rank = max(a.shape[0] for a, _, _, _ in changes.values())
    scale = next(iter(changes.values()))[2]
    dora = any(magnitude is not None for *_, magnitude in changes.values())
    if dora and any(magnitude is None for *_, magnitude in changes.values()):
        raise UsageError("mlx-lm has no form for LoRA and DoRA in one adapter; use layout 'peft'")
    tensors = {}
    for hub, (a, b, own_scale, magnitude) in changes.items():
        lacking = rank - a.shape[0]
        tensors[f"{hub}.lora_a"] = mx.pad(a, [(0, lacking), (0, 0)]).T
        tensors[f"{hub}.lora_b"] = (mx.pad(b, [(0, 0), (0, lacking)]) * (own_scale / scale)).T
        if magnitude is not None:
            tensors[f"{hub}.m"] = magnitude
    touched = [place[1] for place in map(layer_of, content.parts) if place]
    keys = sorted({re.sub(r"^.*?\.\d+\.", "", hub) for hub in changes})
    values = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": depth - min(touched) if touched else 0,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": getattr(adapter.method, "dropout", 0.0),
            "keys": keys,
        },
    }
    return values, tensors


def _whole_groups(model: Transformer, rules: tuple[Any, ...], own: dict[str, mx.array]) -> dict[str, mx.array]:
    """The parameters, with the untouched ones that share a tensor on disk with them."""
    from mlxlm.models.weights import hub_name

    names = {hub_name(rules, name) for name in own}
    base = base_parameters(model)
    return {name: own.get(name, array) for name, array in base.items() if hub_name(rules, name) in names}
