"""Rotary positions in a config.json, in both dialects.

transformers 4 and its contemporaries write `rope_theta`, `rope_scaling` and `partial_rotary_factor` side by side;
transformers 5 puts all into `rope_parameters`. Both are read; where both are present they must agree. Written is the
older dialect, which every version reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxlm.errors import ConfigError, UnsupportedModelError, nearest
from mlxlm.layers import (
    DynamicScalingSpec,
    LinearScalingSpec,
    LongScalingSpec,
    NoScalingSpec,
    ProportionalScalingSpec,
    RotarySpec,
    WavelengthScalingSpec,
    YarnScalingSpec,
)
from mlxlm.models.hub_config import HubConfig

_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
_OTHER_NAMES = {"su": "longrope", "ntk": "dynamic"}


def parse_rotary(
    hub: HubConfig, head_dim: int, *, base: float = 10000.0, partial: float | None = None, layout: str = "half"
) -> RotarySpec:
    """The rotary choice of a config with one kind of rotary positions.

    base, partial: what holds when the config doesn't say (rope theta; the rotated share of a head). partial None, the
    default, is for families that rotate whole heads, whatever share a config names: such a share is refused.
    """
    max_length = hub.take("max_position_embeddings", default=None)
    outer = {
        "rope_theta": hub.take("rope_theta", "rotary_emb_base", default=None),
        "partial_rotary_factor": hub.take("partial_rotary_factor", "rotary_pct", default=None),
    }
    scaling = dict(hub.take("rope_scaling", default={}) or {})
    parameters = dict(hub.take("rope_parameters", default={}) or {})
    original = hub.take("original_max_position_embeddings", default=None)
    merged = _merge(outer, scaling, parameters)
    if original is not None:
        merged["original_max_position_embeddings"] = original
    return rotary_from_parameters(merged, head_dim, max_length=max_length, base=base, partial=partial, layout=layout)


def parse_layered_rotary(
    hub: HubConfig,
    head_dim: int,
    bases: Mapping[str, float],
    *,
    older: Mapping[str, str],
    scaled: str,
    layout: str = "half",
) -> dict[str, RotarySpec]:
    """The rotary choice of each type of layer, by the names that `layer_types` uses.

    bases: rope theta of each type where the config doesn't say.  older: the key that holds it in the older dialect,
    where the types share no entry.  scaled: the type that the older dialect's `rope_scaling` is for.
    A flat `rope_parameters` is refused: it would leave open which type it is for.
    """
    max_length = hub.take("max_position_embeddings", default=None)
    parameters = dict(hub.take("rope_parameters", default={}) or {})
    scaling = dict(hub.take("rope_scaling", default={}) or {})
    unknown = sorted(set(parameters) - set(bases))
    if unknown:
        raise ConfigError(
            f"config.json: rope_parameters has {', '.join(unknown)}, expected one entry each for {' and '.join(bases)}"
        )
    result = {}
    for name, base in bases.items():
        outer = {"rope_theta": hub.take(older[name], default=None)}
        merged = _merge(outer, scaling if name == scaled else {}, dict(parameters.get(name) or {}))
        result[name] = rotary_from_parameters(
            merged, head_dim, max_length=max_length, base=base, partial=None, layout=layout
        )
    return result


def unparse_layered_rotary(
    specs: Mapping[str, RotarySpec], head_dim: int, *, older: Mapping[str, str], scaled: str
) -> dict[str, Any]:
    """The keys of a config.json that `parse_layered_rotary` reads back, in both dialects at once where they allow it:
    transformers 5 reads the nested one, programs made for version 4 the other.
    """
    keys: dict[str, Any] = {older[name]: spec.base for name, spec in specs.items()}
    keys["rope_scaling"] = (scaling_parameters(specs[scaled].scaling) or None) if scaled in specs else None
    nested = {}
    for name, spec in specs.items():
        flat = unparse_rotary(spec, head_dim)
        nested[name] = {"rope_type": "default", **(flat.pop("rope_scaling") or {}), **flat}
    keys["rope_parameters"] = nested
    return keys


def _merge(outer: dict[str, Any], scaling: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    for values in (scaling, parameters):
        if "type" in values:
            values.setdefault("rope_type", values["type"])
            del values["type"]
    merged = {name: value for name, value in outer.items() if value is not None}
    for values in (scaling, parameters):
        for name, value in values.items():
            if name in merged and value is not None and merged[name] != value:
                raise ConfigError(
                    f"config.json contradicts itself: {name} is {merged[name]!r} in one place and {value!r} in another"
                )
            merged[name] = value
    return merged


def rotary_from_parameters(
    parameters: dict[str, Any],
    head_dim: int,
    *,
    max_length: int | None,
    base: float,
    partial: float | None,
    layout: str,
) -> RotarySpec:
    """The rotary choice that one flat set of rope parameters describes. Every key must be known."""
    left = dict(parameters)
    left.pop("finetuned", None)  # says whether the stretched model was trained further
    name = left.pop("rope_type", None) or "default"
    name = _OTHER_NAMES.get(name, name)
    theta = left.pop("rope_theta", None)
    share = left.pop("partial_rotary_factor", None)
    theta = base if theta is None else float(theta)
    if partial is None and share not in (None, 1.0) and name != "proportional":
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor = {share}, but models of this family rotate whole heads"
        )
    share = float(share) if share is not None else 1.0 if partial is None else partial
    dim = int(head_dim * share)
    if name not in _TYPES:
        raise UnsupportedModelError(f"config.json: rope type {name!r} is not implemented{nearest(name, _TYPES)}")
    if name == "proportional":
        dim = head_dim
    scaling = _scaling(name, left, max_length, share)
    left = {key: value for key, value in left.items() if value is not None}
    if left:
        raise ConfigError(f"config.json: rope parameters of type {name!r} have unknown keys {', '.join(sorted(left))}")
    return RotarySpec(dim=dim, base=theta, layout=layout, scaling=scaling)  # type: ignore[arg-type]


def _scaling(name: str, left: dict[str, Any], max_length: int | None, share: float) -> NoScalingSpec:
    """Takes its keys out of `left`."""

    def need(key: str, default: Any = None) -> Any:
        value = left.pop(key, None)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"config.json: rope parameters of type {name!r} lack {key!r}")
        return value

    if name == "default":
        # Written next to the default type by some tools, where they have no effect.
        left.pop("factor", None), left.pop("original_max_position_embeddings", None)
        return NoScalingSpec()
    if name == "linear":
        return LinearScalingSpec(factor=float(need("factor")))
    if name == "proportional":
        return ProportionalScalingSpec(proportion=share, factor=float(need("factor", 1.0)))
    if name == "dynamic":
        left.pop("original_max_position_embeddings", None)  # transformers reads max_position_embeddings alone
        if max_length is None:
            raise ConfigError("config.json: dynamic rope needs max_position_embeddings")
        return DynamicScalingSpec(factor=float(need("factor")), original_length=int(max_length))
    original = int(need("original_max_position_embeddings", max_length))
    if name == "llama3":
        return WavelengthScalingSpec(
            factor=float(need("factor")),
            low_factor=float(need("low_freq_factor")),
            high_factor=float(need("high_freq_factor")),
            original_length=original,
        )
    factor = float(need("factor", None if max_length is None else max_length / original))
    explicit = left.pop("attention_factor", None)
    if name == "longrope":
        return LongScalingSpec(
            short_factors=tuple(need("short_factor")),
            long_factors=tuple(need("long_factor")),
            original_length=original,
            factor=factor,
            explicit_factor=explicit,
        )
    return YarnScalingSpec(
        factor=factor,
        original_length=original,
        beta_fast=float(left.pop("beta_fast", None) or 32.0),
        beta_slow=float(left.pop("beta_slow", None) or 1.0),
        mscale=left.pop("mscale", None),
        mscale_all_dim=left.pop("mscale_all_dim", None),
        explicit_factor=explicit,
        truncate=bool(need("truncate", True)),
    )


def unparse_rotary(spec: RotarySpec, head_dim: int) -> dict[str, Any]:
    """The keys of a config.json that `parse_rotary` reads back as `spec`."""
    keys: dict[str, Any] = {"rope_theta": spec.base}
    if spec.dim != head_dim:
        keys["partial_rotary_factor"] = spec.dim / head_dim
    parameters = scaling_parameters(spec.scaling)
    if isinstance(spec.scaling, ProportionalScalingSpec):
        keys["partial_rotary_factor"] = spec.scaling.proportion
    keys["rope_scaling"] = parameters or None
    return keys


def scaling_parameters(scaling: NoScalingSpec) -> dict[str, Any]:
    """The `rope_scaling` entry of a scaling, empty for none."""
    if isinstance(scaling, LinearScalingSpec):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, ProportionalScalingSpec):
        return {"rope_type": "proportional", "factor": scaling.factor}
    if isinstance(scaling, DynamicScalingSpec):
        return {"rope_type": "dynamic", "factor": scaling.factor}
    if isinstance(scaling, WavelengthScalingSpec):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_factor,
            "high_freq_factor": scaling.high_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    if isinstance(scaling, LongScalingSpec):
        keys = {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "attention_factor": scaling.explicit_factor,
        }
    elif isinstance(scaling, YarnScalingSpec):
        keys = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
            "attention_factor": scaling.explicit_factor,
            "truncate": scaling.truncate,
        }
    else:
        return {}
    return {name: value for name, value in keys.items() if value is not None}
