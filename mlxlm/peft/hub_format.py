"""Adapters as Hugging Face PEFT keeps them: adapter_config.json and adapter_model.safetensors, in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.errors import ConfigError, UsageError, WeightsError, listing
from mlxlm.models.weights import hub_name, to_canonical, to_hub
from mlxlm.peft.fused import Module, joined_lora, module_on_disk, modules_of, split_lora
from mlxlm.peft.hub_config import by_pattern, check_keys, common_values
from mlxlm.peft.ia3 import Ia3, ScalePart
from mlxlm.peft.lora import Dora, Lora, LoraEmbeddingPart, LoraPart
from mlxlm.peft.method import Content, Method
from mlxlm.peft.places import EMBEDDING, LINEAR, at, bare, base_modules, base_parameters, hub_path, input_dim, rules_of
from mlxlm.peft.prefix import PrefixTokens, PrefixTuning, slots_for
from mlxlm.peft.prompts import PromptTokens, PromptTuning, PTuning, reading_stack

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.peft.adapters import Adapter

_PREFIX = "base_model.model."
_VIRTUAL_PREFIX = "base_model."  # with virtual tokens there is no model around the model
_PIECE = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)(\.weight)?")
Pieces = dict[str, dict[str, mx.array]]


def read_peft(model: Transformer, values: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> tuple[Method, Content]:
    """The adapter that a PEFT folder holds.  values: of adapter_config.json.  tensors: by their names on disk.

    Raises ConfigError for settings that aren't implemented, WeightsError for tensors that don't fit the model.
    """
    kind = check_keys(values)
    rules = _rules(model)
    pieces: Pieces = {}
    own: dict[str, mx.array] = {}
    prompt = None
    for name, array in tensors.items():
        name = name.removeprefix(_PREFIX if kind in ("LORA", "IA3") else _VIRTUAL_PREFIX)
        found = _PIECE.fullmatch(name)
        if found:
            pieces.setdefault(found[1], {})[found[2]] = array
        elif name == "prompt_embeddings":
            prompt = array
        else:
            own[name] = array
    content = Content(own=_own(model, rules, own))
    if (prompt is not None) == (kind in ("LORA", "IA3")):
        raise WeightsError(
            f"an adapter of peft_type {kind} {'has no' if prompt is not None else 'needs'} prompt tensor"
        )
    if kind == "LORA":
        method: Method = _lora_method(values)
        _check_complete(rules, model, values, pieces)
        for hub, arrays in pieces.items():
            content.parts.update(_lora_parts(model, rules, hub, arrays, values))
    elif kind == "IA3":
        method = Ia3(targets=_strings(values["target_modules"]), feed_forward=_strings(values["feedforward_modules"]))
        for hub, arrays in pieces.items():
            content.parts.update(_ia3_parts(model, module_on_disk(rules, hub), arrays["ia3_l"]))
    else:
        method, content.prompt = _virtual_tokens(model, kind, values, prompt)
    return method, content


def _rules(model: Transformer) -> tuple[Any, ...]:
    rules = rules_of(model)
    if not rules:
        raise UsageError("this model was not loaded from a checkpoint, so nothing says what its modules are called")
    return rules


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _own(model: Transformer, rules: tuple[Any, ...], given: dict[str, mx.array]) -> dict[str, mx.array]:
    """Whole parameters that an adapter brings, by canonical name, in the shapes of the model's."""
    tensors = {name.replace(".base_layer.", "."): array for name, array in given.items()}
    translation = to_canonical(rules, tensors)
    beside = {name.replace(".base_layer.", ".") for name in given if ".base_layer." in name}
    adapted = {name for name, origin in translation.origins.items() if origin in beside}
    have = base_parameters(model)
    wrong = list(translation.unexpected)
    for name, array in translation.tensors.items():
        if name not in have:
            wrong.append(f"{translation.origins[name]} (the model has no {name})")
        elif have[name].shape != array.shape:
            wrong.append(f"{translation.origins[name]} {tuple(array.shape)}, expected {tuple(have[name].shape)}")
    if wrong:
        raise WeightsError(f"the adapter has tensors that don't fit the model: {listing(wrong)}")
    # A table that is adapted is stored beside its change, mostly as it was.
    return {
        name: array.astype(have[name].dtype)
        for name, array in translation.tensors.items()
        if not (name in adapted and mx.array_equal(array.astype(have[name].dtype), have[name]))
    }


def _lora_method(values: Mapping[str, Any]) -> Lora:
    kind = Dora if values.get("use_dora") else Lora
    return kind(
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values.get("lora_dropout") or 0.0,
        rank_stabilized=bool(values.get("use_rslora")),
        targets=_strings(values.get("target_modules")),
        modules_to_save=_strings(values.get("modules_to_save")),
    )


def _check_complete(rules: tuple[Any, ...], model: Transformer, values: Mapping[str, Any], pieces: Pieces) -> None:
    """Raise WeightsError when a module that target_modules lists has no tensors in the file."""
    targets, excluded = values.get("target_modules"), values.get("exclude_modules")
    if not isinstance(targets, list) or excluded or values.get("layers_to_transform") is not None:
        return
    linear = {hub_path(rules, path) for path, module in base_modules(model) if isinstance(module, LINEAR)}
    wanted = {hub for hub in linear if hub and any(hub == t or hub.endswith(f".{t}") for t in targets)}
    missing = sorted(hub for hub in wanted if hub not in pieces and not any(p.endswith(hub) for p in pieces))
    if missing:
        raise WeightsError(f"the adapter lacks the tensors of modules that it targets: {listing(missing)}")


def _lora_parts(
    model: Transformer, rules: tuple[Any, ...], hub: str, arrays: dict[str, mx.array], values: Mapping[str, Any]
) -> dict[str, LoraPart | LoraEmbeddingPart]:
    module = module_on_disk(rules, hub)
    table = "lora_embedding_A" in arrays
    names = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A", "lora_B")
    if any(name not in arrays for name in names):
        raise WeightsError(f"the adapter has only one of the two matrices of {hub}")
    lora_a, lora_b = (arrays[name].astype(mx.float32) for name in names)
    base = [bare(at(model, path)) for path in module.paths]
    if table != isinstance(base[0], EMBEDDING):
        raise WeightsError(f"the adapter takes {hub} for {'a table' if table else 'a linear layer'}, which it isn't")
    rank = lora_a.shape[0]
    if table:
        expected = (rank, model.config.embeddings.vocab_size), (model.config.dim, rank)
    else:
        expected = (rank, input_dim(base[0])), (sum(part.weight.shape[0] for part in base), rank)
    if (lora_a.shape, lora_b.shape) != expected:
        raise WeightsError(f"{hub}: the adapter has {lora_a.shape} and {lora_b.shape}, expected {expected}")
    if by_pattern(values.get("rank_pattern"), hub, values["r"]) != rank:
        raise WeightsError(f"{hub}: the adapter has rank {rank}, but its config says another")
    alpha = by_pattern(values.get("alpha_pattern"), hub, values["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
    magnitude = arrays.get("lora_magnitude_vector")
    if (magnitude is not None) != bool(values.get("use_dora")):
        raise WeightsError(f"{hub}: a magnitude belongs to use_dora, and only to that")
    magnitude = None if magnitude is None else magnitude.astype(mx.float32).reshape(-1)
    outputs = expected[1][0]
    if magnitude is not None and magnitude.size != outputs:
        raise WeightsError(f"{hub}: the adapter has {magnitude.size} magnitudes, expected {outputs}")
    if table:
        return {module.paths[0]: LoraEmbeddingPart(lora_a, lora_b, scale, magnitude)}
    return split_lora(module, lora_a, lora_b, scale, values.get("lora_dropout") or 0.0, magnitude)


def _ia3_parts(model: Transformer, module: Module, scale: mx.array) -> dict[str, ScalePart]:
    base = [bare(at(model, path)) for path in module.paths]
    outputs = sum(part.weight.shape[0] for part in base)
    scale = scale.astype(mx.float32)
    if scale.shape == (outputs, 1):
        return {p: ScalePart(s, False) for p, s in zip(module.paths, module.split(scale.reshape(-1)), strict=True)}
    if scale.shape == (1, input_dim(base[0])):
        return {path: ScalePart(scale.reshape(-1), True) for path in module.paths}
    raise WeightsError(f"{module.hub}: the adapter has a vector {scale.shape}, expected ({outputs}, 1) or (1, inputs)")


def _virtual_tokens(
    model: Transformer, kind: str, values: Mapping[str, Any], prompt: mx.array
) -> tuple[Method, PromptTokens | PrefixTokens]:
    count, config = values["num_virtual_tokens"], model.config
    prompt = prompt.astype(mx.float32)
    if kind == "PREFIX_TUNING":
        slots = slots_for(config, "decoder")
        expected = (count, 2 * slots.count * slots.dim)
        if config.has_memory and values.get("num_transformer_submodules", 2) != 2:
            raise ConfigError("adapter_config.json: num_transformer_submodules of an encoder-decoder is 2")
        if prompt.shape != expected:
            raise WeightsError(f"the adapter's prefix is {tuple(prompt.shape)}, expected {expected} for this model")
        method = PrefixTuning(num_tokens=count, projection=False, attentions="decoder")
        return method, PrefixTokens(count, slots, weight=prompt)
    if prompt.ndim != 2 or prompt.shape[0] < count or prompt.shape[1] != config.dim:
        raise WeightsError(f"the adapter's prompt is {tuple(prompt.shape)}, expected ({count}, {config.dim})")
    # Of an encoder-decoder there are as many again, which nothing reads.
    method = PromptTuning(num_tokens=count) if kind == "PROMPT_TUNING" else PTuning(num_tokens=count)
    weight = prompt[:count] / config.embeddings.scale  # they stand beside vectors that have been scaled
    return method, PromptTokens(weight, reading_stack(model))


def write_peft(model: Transformer, adapter: Adapter) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """adapter_config.json and the tensors of an adapter. Raises UsageError for one that PEFT has no form for."""
    content, rules = adapter.content, _rules(model)
    prefix = _PREFIX if content.prompt is None else _VIRTUAL_PREFIX
    tensors = {prefix + name: array for name, array in to_hub(rules, content.own).items()}
    kinds = {type(part) for part in content.parts.values()}
    if content.added or not kinds <= {LoraPart, LoraEmbeddingPart, ScalePart} or (kinds and content.prompt):
        raise UsageError(f"Hugging Face PEFT has no form for {adapter.method.name}; use another layout")
    if content.prompt is not None:
        values, extra = _write_virtual(model, content.prompt, adapter.method)
    elif ScalePart in kinds:
        values, extra = _write_ia3(model, rules, content.parts)
    elif kinds:
        values, extra = _write_lora(model, rules, content.parts, adapter.method)
    else:
        raise UsageError(f"Hugging Face PEFT has no form for {adapter.method.name}; use layout 'mlx'")
    saved = sorted({hub_name(rules, name).rpartition(".")[0] for name in content.own})
    return values | {"modules_to_save": saved or None}, tensors | extra


def _write_lora(
    model: Transformer, rules: tuple[Any, ...], parts: dict[str, Any], method: Method
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    tensors, ranks, scales = {}, {}, {}
    transposed = False
    modules = modules_of(rules, list(parts))
    for module in modules:
        key = _PREFIX + module.hub
        table = parts.get(module.paths[0])
        if isinstance(table, LoraEmbeddingPart):
            tensors |= {f"{key}.lora_embedding_A": table.lora_a, f"{key}.lora_embedding_B": table.lora_b}
            if "magnitude" in table:
                tensors[f"{key}.lora_magnitude_vector"] = table.magnitude
            ranks[module.hub], scales[module.hub] = table.lora_a.shape[0], table.scale
            continue
        whole = joined_lora(model, module, parts)
        tensors |= {f"{key}.lora_A.weight": whole.lora_a, f"{key}.lora_B.weight": whole.lora_b}
        if whole.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = whole.magnitude
        ranks[module.hub], scales[module.hub] = whole.lora_a.shape[0], whole.scale
        transposed = transposed or module.transposed(model)
    stable = bool(getattr(method, "rank_stabilized", False))
    alphas = {hub: scales[hub] * (math.sqrt(rank) if stable else rank) for hub, rank in ranks.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    values = common_values(model, "LORA") | {
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": getattr(method, "dropout", 0.0),
        "target_modules": _target_names(model, rules, [module.hub for module in modules]),
        "bias": "none",
        "use_rslora": stable,
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in tensors),
        "fan_in_fan_out": transposed,
        "rank_pattern": {hub: other for hub, other in ranks.items() if other != rank},
        "alpha_pattern": {hub: _number(other) for hub, other in alphas.items() if other != alpha},
    }
    return values, tensors


def _commonest(values: Any) -> Any:
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)


def _number(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _target_names(model: Transformer, rules: tuple[Any, ...], hubs: list[str]) -> list[str]:
    """Names for target_modules: last parts where every module so called is meant, else whole paths."""
    every = {hub_path(rules, path) for path, module in base_modules(model) if isinstance(module, (*LINEAR, *EMBEDDING))}
    meant, names = set(hubs), []
    for hub in hubs:
        last = hub.split(".")[-1]
        alike = {other for other in every if other and (other == last or other.endswith(f".{last}"))}
        names.append(last if alike <= meant else hub)
    return sorted(set(names))


def _write_ia3(
    model: Transformer, rules: tuple[Any, ...], parts: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    tensors, inner, transposed = {}, [], False
    modules = modules_of(rules, list(parts))
    for module in modules:
        transposed = transposed or module.transposed(model)
        present = [parts[path] for path in module.paths if path in parts]
        if present[0].on_input:
            if any(not mx.array_equal(part.scale, present[0].scale) for part in present[1:]):
                raise UsageError(f"{module.hub} is one module on disk and its parts have different input scales")
            tensors[f"{_PREFIX}{module.hub}.ia3_l"] = present[0].scale[None]
            inner.append(module.hub)
            continue
        whole = [
            parts[path].scale if path in parts else mx.ones((bare(at(model, path)).weight.shape[0],))
            for path in module.paths
        ]
        tensors[f"{_PREFIX}{module.hub}.ia3_l"] = module.join(whole)[:, None]
    values = common_values(model, "IA3") | {
        "target_modules": _target_names(model, rules, [module.hub for module in modules]),
        "feedforward_modules": _target_names(model, rules, inner),
        "fan_in_fan_out": transposed,
    }
    return values, tensors


def _write_virtual(model: Transformer, prompt: Any, method: Method) -> tuple[dict[str, Any], dict[str, mx.array]]:
    config, attention = model.config, model.config.stack.layers[0].attention
    twice = 2 if config.has_memory else 1
    values = {
        "num_virtual_tokens": prompt.length,
        "token_dim": config.dim,
        "num_transformer_submodules": twice,
        "num_attention_heads": attention.num_heads,
        "num_layers": len(config.stack.layers),
    }
    encoded = prompt.encoded()
    if isinstance(prompt, PrefixTokens):
        if any(
            kind == "memory" or (config.has_memory and stack == "encoder") for stack, _, kind in prompt.slots.places
        ):
            raise UsageError(
                "Hugging Face PEFT gives a prefix to the decoder alone; train with attentions='decoder' to write it"
            )
        values |= {"num_attention_heads": prompt.slots.heads, "token_dim": prompt.slots.dim, "prefix_projection": False}
        values["encoder_hidden_size"] = prompt.slots.dim
        return common_values(model, "PREFIX_TUNING") | values, {"prompt_embeddings": encoded}
    kind = "P_TUNING" if isinstance(method, PTuning) else "PROMPT_TUNING"
    if kind == "P_TUNING":
        values["encoder_hidden_size"] = method.hidden_dim or config.dim
    else:
        values["prompt_tuning_init"] = "RANDOM"
    return common_values(model, kind) | values, {
        "prompt_embeddings": mx.concatenate([encoded * config.embeddings.scale] * twice)
    }
