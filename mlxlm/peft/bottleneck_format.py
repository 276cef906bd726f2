"""Bottleneck adapters as the adapters library keeps them: adapter_config.json and adapter.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.errors import ConfigError, UsageError, WeightsError, listing
from mlxlm.layers import NoNormSpec, ParallelBlock
from mlxlm.models.weights import hub_name
from mlxlm.peft.bottleneck import BottleneckPart, Houlsby, ParallelAdapter, Pfeiffer
from mlxlm.peft.method import Content, Method
from mlxlm.peft.places import at, bare, rules_of

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.peft.adapters import Adapter

# What tells the three kinds apart: (mh_adapter, output_adapter, original_ln_before, is_parallel).
_KINDS: dict[tuple[bool, bool, bool, bool], type[Houlsby]] = {
    (True, True, False, False): Houlsby,
    (False, True, True, False): Pfeiffer,
    (False, True, False, True): ParallelAdapter,
}
# Settings that must have these values; any other changes the result.
_FIXED: dict[str, Any] = {
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "residual_before_ln": True,
    "inv_adapter": None,
    "phm_layer": False,
}
# How weights begin, training alone, or details of what is off.
_INERT = (
    "init_weights", "init_weights_seed", "dropout", "adapter_residual_before_ln", "inv_adapter_reduction_factor",
    "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range",
    "phm_dim", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias", "stochastic_depth", "architecture",
)  # fmt: skip
# By part of a block: the projection inside it by which the library's module is found, and what that may be called.
_INSIDE = {
    "attention": ("output", "attention_adapters"),
    "cross_attention": ("output", "cross_attention_adapters"),
    "feed_forward": ("down", "output_adapters"),
}
_ACTIVATIONS = {"swish": "silu", "silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}


def _method(model: Transformer, values: Mapping[str, Any]) -> Houlsby:
    config = dict(values["config"])
    flags = ("mh_adapter", "output_adapter", "original_ln_before", "is_parallel")
    kind = tuple(bool(config.pop(flag, False)) for flag in flags)
    wrong = [f"{key} = {config.pop(key)!r}" for key, good in _FIXED.items() if config.get(key, good) != good]
    act, scale = config.pop("non_linearity"), config.pop("scaling", 1.0)
    reduction, skipped = config.pop("reduction_factor"), config.pop("leave_out", [])
    cross = bool(config.pop("cross_adapter", False))
    wrong += [f"{key} = {value!r}" for key, value in config.items() if key not in (*_FIXED, *_INERT) and value]
    if kind not in _KINDS:
        wrong.append(", ".join(f"{flag} = {value}" for flag, value in zip(flags, kind, strict=True)))
    if act not in _ACTIVATIONS:
        wrong.append(f"non_linearity = {act!r}")
    if isinstance(scale, str):
        wrong.append(f"scaling = {scale!r}")
    if isinstance(reduction, Mapping):
        wrong.append("reduction_factor by layer")
    if wrong:
        raise ConfigError(f"adapter_config.json: settings that are not implemented: {listing(wrong)}")
    layers = tuple(layer for number, layer in enumerate(_layers(model)) if number not in skipped) if skipped else None
    return _KINDS[kind](
        reduction=reduction, activation=_ACTIVATIONS[act], scale=scale, layers=layers, cross_attention=cross
    )


def _layers(model: Transformer) -> list[str]:
    """All layers such as "encoder.0", in the order in which the library numbers them through both stacks."""
    stacks = (("encoder", model.config.encoder), ("decoder", model.config.decoder))
    return [f"{stack}.{number}" for stack, spec in stacks if spec for number, _ in enumerate(spec.layers)]


def _places(model: Transformer, method: Houlsby) -> dict[str, str]:
    """Where the library keeps the adapter of each place of ours: hub path without the adapter's name, by our path."""
    rules = rules_of(model)
    if not rules:
        raise UsageError("this model was not loaded from a checkpoint, so nothing says what its modules are called")
    found = {}
    for path, part in method.places(model).items():
        block = path.rpartition(".")[0]
        module = bare(at(model, block))
        if isinstance(module, ParallelBlock) or isinstance(bare(at(model, path)), ParallelBlock):
            raise UsageError("the adapters library has no form for adapters of blocks whose parts run in parallel")
        spec = getattr(module.spec, f"{part}_residual")
        if isinstance(method, ParallelAdapter) and not isinstance(spec.norm_in, NoNormSpec):
            raise UsageError(
                f"the adapters library puts a parallel adapter before the norm of the {part.replace('_', '-')} layer; "
                "the same as here only for models without a norm there"
            )
        inner, name = _INSIDE[part]
        found[path] = _keeper(hub_name(rules, f"{block}.{part}.{inner}.weight"), name)
    return found


def _keeper(hub: str, name: str) -> str:
    """The module that holds the adapters around an output projection."""
    if hub.endswith(".dense.weight"):
        return hub.removesuffix("dense.weight") + "adapters"
    layer = re.match(r"(.*\.\d+)\.", hub)
    assert layer is not None
    if re.search(r"\.\d+\.\w+\.\d+$", layer[1]):
        return (
            f"{layer[1]}.adapters"  # the parts of a block are modules with numbers of their own, and each keeps its own
        )
    return f"{layer[1]}.{name}.adapters"


def read_bottleneck(
    model: Transformer, values: Mapping[str, Any], tensors: Mapping[str, mx.array]
) -> tuple[Method, Content]:
    """The adapter that a folder of the adapters library holds.  values: of adapter_config.json.  tensors: by name.

    Raises ConfigError for settings that aren't implemented, WeightsError for tensors that don't fit the model.
    """
    method, content, left = _method(model, values), Content(), dict(tensors)
    for path, keeper in _places(model, method).items():
        key = f"{keeper}.{values['name']}"
        names = [f"{key}.{part}.{kind}" for part in ("adapter_down.0", "adapter_up") for kind in ("weight", "bias")]
        missing = [name for name in names if name not in left]
        if missing:
            raise WeightsError(f"the adapter lacks {listing(missing)}")
        down, down_bias, up, up_bias = (left.pop(name).astype(mx.float32) for name in names)
        dim, width = model.config.dim, down.shape[0]
        if (down.shape, up.shape) != ((width, dim), (dim, width)):
            raise WeightsError(f"{key}: {down.shape} and {up.shape}, expected (width, {dim}) and ({dim}, width)")
        part = BottleneckPart(dim, width, method.activation, scale=method.scale, parallel=method.parallel)
        part.down.weight, part.down.bias, part.up.weight, part.up.bias = down, down_bias, up, up_bias
        (content.added if isinstance(method, Pfeiffer) else content.parts)[path] = part
    if left:
        raise WeightsError(f"the adapter has tensors that don't fit the model: {listing(left)}")
    return method, content


def write_bottleneck(model: Transformer, adapter: Adapter) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """adapter_config.json and the tensors of a bottleneck adapter. Raises UsageError for any other."""
    method, content = adapter.method, adapter.content
    if not isinstance(method, Houlsby) or content.own:
        raise UsageError("the adapters library's layout is for bottleneck adapters without further modules")
    act = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}.get(method.activation)
    if act is None:
        raise UsageError(f"the adapters library has no activation {method.activation!r}")
    tensors = {}
    for path, keeper in _places(model, method).items():
        part = (content.added if isinstance(method, Pfeiffer) else content.parts)[path]
        for name, linear in (("adapter_down.0", part.down), ("adapter_up", part.up)):
            tensors[f"{keeper}.{adapter.name}.{name}.weight"] = linear.weight
            tensors[f"{keeper}.{adapter.name}.{name}.bias"] = linear.bias
    kinds = {kind: flags for flags, kind in _KINDS.items()}[type(method)]
    flags = dict(zip(("mh_adapter", "output_adapter", "original_ln_before", "is_parallel"), kinds, strict=True))
    source = model.source
    kept = {block.replace(".layers.", ".") for block in method.blocks(model)}
    skipped = [number for number, layer in enumerate(_layers(model)) if layer not in kept]
    config = {
        **flags,
        **_FIXED,
        "non_linearity": act,
        "reduction_factor": method.reduction,
        "scaling": float(method.scale),
        "cross_adapter": method.cross_attention,
        "leave_out": skipped,
        "dropout": 0.0,
    }
    values = {
        "config": config,
        "name": adapter.name,
        "hidden_size": model.config.dim,
        "model_type": source.values.get("model_type"),
        "model_name": str(source.path),
        "model_class": (source.values.get("architectures") or [None])[0],
        "version": "adapters.1.3.0",
    }
    return values, tensors
