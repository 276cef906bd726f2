"""Which implementation serves a call."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from importlib import import_module, util
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlxlm import runtime
from mlxlm.errors import AttentionError, nearest
from mlxlm.kernels.attention import fused, tuning
from mlxlm.kernels.attention.device import device_profile
from mlxlm.kernels.attention.mask import AttentionMask
from mlxlm.kernels.attention.problem import AttentionProblem, describe

_MODULES = {"metal": "metal", "mlx": "fused", "tiled": "tiled", "reference": "reference"}
IMPLEMENTATIONS = tuple(_MODULES)

# Up to this many queries the scores are small whatever the key length, and MLX has a kernel of its own.
DECODE_LENGTH = 8


@lru_cache(maxsize=1)
def forced_by_environment() -> str:
    """The value of MLXLM_ATTENTION, "auto" when it is not set. Read once."""
    return os.environ.get("MLXLM_ATTENTION") or "auto"


@cache
def load(name: str) -> ModuleType | None:
    """The module of an implementation; None for "metal" where the package was installed without it."""
    module = f"mlxlm.kernels.attention.{_MODULES[name]}"
    if name == "metal" and util.find_spec(module) is None:
        return None
    return import_module(module)


def is_mlx_decoding(query: mx.array, key: mx.array, mask: AttentionMask) -> bool:
    """Whether "auto" gives a call without modifiers to mx.fast with no mask at all: a quick test for decoding steps."""
    query_length = query.shape[2]
    if query_length > DECODE_LENGTH or not mask.is_plain(query_length, key.shape[2]):
        return False
    backend = runtime.backend()
    return backend != "metal" and not tuning.record(backend).choices


def choose(
    implementation: str, query: mx.array, key: mx.array, value: mx.array, mask: AttentionMask, modifiers: dict[str, Any]
) -> str:
    """The name of the implementation for a call: the one asked for, or for "auto" the best that can serve.

    modifiers: the keyword arguments of `attention` besides scale and mask.
    Raises AttentionError for an unknown name, and for a forced implementation that can't serve the call.
    """
    if implementation == "auto":
        return _automatic(query, key, value, mask, modifiers)
    if implementation not in _MODULES:
        raise AttentionError(
            f"unknown attention implementation {implementation!r}{nearest(implementation, ('auto', *_MODULES))}"
        )
    reason = None
    if implementation == "mlx":
        reason = _mlx_refusal(query, modifiers)
    elif implementation == "metal":
        reason = _metal_refusal(describe(query, key, value, mask, **modifiers))
    if reason is not None:
        raise AttentionError(f"attention implementation {implementation!r} can't serve this call: {reason}")
    return implementation


def _automatic(query: mx.array, key: mx.array, value: mx.array, mask: AttentionMask, modifiers: dict[str, Any]) -> str:
    """The tuning record's choice; else our Metal kernels; else MLX where it is frugal or the call small; else tiles."""
    backend = runtime.backend()
    on_metal = backend == "metal"
    record = tuning.record(backend)
    mlx_serves = _mlx_refusal(query, modifiers) is None
    if not on_metal and mlx_serves and not record.choices and query.shape[2] <= DECODE_LENGTH:
        return "mlx"
    problem = describe(query, key, value, mask, **modifiers)
    metal_serves = on_metal and "metal" not in record.disabled and _metal_refusal(problem) is None
    choice = record.choices.get(tuning.problem_key(problem))
    if choice == "tiled" or (choice == "mlx" and mlx_serves) or (choice == "metal" and metal_serves):
        return choice
    if metal_serves:
        return "metal"
    if mlx_serves and (
        problem.query_length <= DECODE_LENGTH
        or problem.score_bytes <= device_profile(backend).short_bytes
        or _mlx_is_linear(backend, problem, mask)
    ):
        return "mlx"
    return "tiled"


def _mlx_refusal(query: mx.array, modifiers: dict[str, Any]) -> str | None:
    return fused.refusal(
        query.dtype,
        alibi_slopes=modifiers["alibi_slopes"],
        relative_bias=modifiers["relative_bias"],
        bias=modifiers["bias"],
        softcap=modifiers["softcap"],
        dropout=modifiers["dropout"],
        return_lse=modifiers["return_lse"],
    )


def _metal_refusal(problem: AttentionProblem) -> str | None:
    """Why our Metal kernels can't serve a problem here, or None when they can."""
    module = load("metal")
    if module is None:
        return "this installation has no Metal kernels"
    if not module.available():
        return "there is no Metal device"
    return module.serves(problem)


def _mlx_is_linear(backend: str, problem: AttentionProblem, mask: AttentionMask) -> bool:
    """Whether mx.fast needs no memory of the size of the scores, forward and backward (MLX 0.32).

    On CUDA that is cuDNN's kernel, on Metal the fused kernel and (from 0.32.4) its blocked gradient; the CPU has none.
    Both want plain or causal masks and no additive term.
    """
    simple = not (problem.bias or problem.alibi or problem.relative_bias or problem.sinks) and (
        mask.is_plain(problem.query_length, problem.key_length)
        or mask.is_causal_lower_right(problem.query_length, problem.key_length)
    )
    if not simple or problem.head_dim != problem.value_dim:
        return False
    if backend == "cuda":
        return problem.dtype != "float32" and problem.head_dim <= 128 and problem.head_dim % 8 == 0
    return backend == "metal" and problem.head_dim in (64, 72, 80, 96, 128)
