"""Rotary positions in the metadata of a GGUF file, and the tensors that hold what their frequencies are divided by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.errors import ConfigError
from mlxlm.layers import (
    LinearScalingSpec,
    LongScalingSpec,
    NoScalingSpec,
    RotarySpec,
    WavelengthScalingSpec,
    YarnScalingSpec,
)
from mlxlm.models.config import TransformerConfig

if TYPE_CHECKING:
    from mlxlm.models.gguf_dialect import GgufHeader

_ONE, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
_BETAS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
_SCALING = "rope.scaling."


def read_rotary(header: GgufHeader, max_length: int | None) -> dict[str, Any]:
    """The keys of a config.json, in the older dialect, that stand for the file's rotary positions."""
    values: dict[str, Any] = {"rope_theta": header.take("rope.freq_base", 10000.0)}
    dim = header.take("rope.dimension_count", header.head_dim)
    if dim != header.head_dim:
        values["partial_rotary_factor"] = dim / header.head_dim
    scaling = _read_scaling(header, max_length)
    if scaling:
        values["rope_scaling"] = scaling
    return values


def _read_scaling(header: GgufHeader, max_length: int | None) -> dict[str, Any]:
    factor, original = header.take(_SCALING + "factor", None), header.take(_SCALING + "original_context_length", None)
    magnitude = header.take(_SCALING + "attn_factor", 1.0)
    kind = header.take(_SCALING + "type", "linear" if factor else "none")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    scaling |= {hub: header.take(gguf, None) for gguf, hub in _BETAS.items()}
    if _ONE in header.tensors:
        # What each frequency is divided by, whatever the formula was.
        factors = header.tensors.read(_ONE)
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            **({"original_max_position_embeddings": original} if original else {}),
        }
    if _LONG in header.tensors:
        short, long = header.tensors.read(_SHORT), header.tensors.read(_LONG)
        scaling |= {"rope_type": "longrope", "short_factor": short, "long_factor": long, "factor": None}
        # Converters write the magnitude that follows from the lengths; only another one needs saying.
        spec = LongScalingSpec(
            short_factors=tuple(short),
            long_factors=tuple(long),
            original_length=original or max_length or 1,
            factor=(max_length or 1) / (original or max_length or 1),
        )
        if not math.isclose(spec.attention_factor, magnitude, rel_tol=1e-6):
            scaling["attention_factor"] = magnitude
    elif magnitude != 1.0:
        raise ConfigError(f"GGUF metadata: {header.prefix}{_SCALING}attn_factor = {magnitude} is not implemented")
    elif kind == "none":
        return {}
    return {name: value for name, value in scaling.items() if value is not None}


def _rotary(config: TransformerConfig) -> RotarySpec:
    """The positions that the keys are about: of layers without a window, where there are such."""
    layers = config.stack.layers
    return next((one for one in layers if one.attention.window is None), layers[0]).attention.positions


def write_rotary(config: TransformerConfig) -> dict[str, Any]:
    """The metadata that `read_rotary` reads; a scaling that GGUF has no name for is left out."""
    positions = _rotary(config)
    if not isinstance(positions, RotarySpec):
        return {}
    given: dict[str, Any] = {"rope.freq_base": positions.base, "rope.dimension_count": positions.dim}
    scaling = positions.scaling
    if isinstance(scaling, LinearScalingSpec):
        given |= {_SCALING + "type": "linear", _SCALING + "factor": scaling.factor}
    elif isinstance(scaling, YarnScalingSpec):
        given |= {_SCALING + "type": "yarn", _SCALING + "factor": scaling.factor}
        given[_SCALING + "original_context_length"] = scaling.original_length
        plain = YarnScalingSpec(factor=scaling.factor, original_length=scaling.original_length)
        given |= {
            gguf: getattr(scaling, name)
            for gguf, name in _BETAS.items()
            if getattr(scaling, name) != getattr(plain, name)
        }
    elif isinstance(scaling, LongScalingSpec):
        given[_SCALING + "original_context_length"] = scaling.original_length
        if scaling.short_factors != scaling.long_factors:
            given[_SCALING + "attn_factor"] = scaling.attention_factor
    return given


def rotary_tensors(config: TransformerConfig) -> dict[str, mx.array]:
    """The tensors of a scaling that divides each frequency by a number of its own; none for others."""
    positions = _rotary(config)
    scaling = positions.scaling if isinstance(positions, RotarySpec) else NoScalingSpec()
    if isinstance(scaling, LongScalingSpec) and scaling.short_factors != scaling.long_factors:
        return {_LONG: mx.array(scaling.long_factors), _SHORT: mx.array(scaling.short_factors)}
    if isinstance(scaling, LongScalingSpec):
        return {_ONE: mx.array(scaling.long_factors)}
    if isinstance(scaling, WavelengthScalingSpec):
        plain = NoScalingSpec().inverse_frequencies(positions.dim, positions.base)
        return {_ONE: plain / scaling.inverse_frequencies(positions.dim, positions.base)}
    return {}
