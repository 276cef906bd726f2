"""The text of the kernels: constants in front of header.metal, and bodies with their parts put in.

Everything that a kernel may branch on is a constant of its text, so each configuration compiles once, to code that
holds nothing it does not need. Lengths, batch sizes, strides and offsets are arguments: they cost no compilation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlm.kernels.attention.dropout import threshold
from mlxlm.kernels.attention.problem import AttentionProblem
from mlxlm.kernels.attention.tile import KernelTile

MIN_HEAD_DIM = 8  # below this an array of queries could be so small that MLX passes it in another address space
_FOLDER = Path(__file__).parent
_LOG2E = 1.4426950408889634
_METAL_TYPES = {"float32": "float", "float16": "half", "bfloat16": "bfloat16_t"}


@dataclass(frozen=True, kw_only=True)
class Features:
    """The static choices that all kernels of one call share.

    bounds, prefix, segments: which parts of the mask there are.  bias: its dtype, "" when there is none.
    *_batched: whether that array has a batch axis of its own, or one row for all.  scale, softcap (0: none), dropout:
    as in the contract.
    """

    dtype: str
    head_dim: int
    value_dim: int
    group: int
    scale: float
    softcap: float
    dropout: float
    bounds: bool
    prefix: bool
    segments: bool
    alibi: bool
    relative_bias: bool
    bias: str
    sinks: bool
    bounds_batched: bool
    prefix_batched: bool
    query_segments_batched: bool
    key_segments_batched: bool
    offset_batched: bool

    def constants(self) -> dict[str, str]:
        """The lines of the header: name -> value of a constant, or of a macro when the name is in capitals with #."""
        lines = {
            "HEAD_DIM": f"{self.head_dim}",
            "VALUE_DIM": f"{self.value_dim}",
            "GROUP": f"{self.group}",
            "BOUNDS_BATCHED": f"{self.bounds_batched:d}",
            "PREFIX_BATCHED": f"{self.prefix_batched:d}",
            "QUERY_SEGMENTS_BATCHED": f"{self.query_segments_batched:d}",
            "KEY_SEGMENTS_BATCHED": f"{self.key_segments_batched:d}",
            "OFFSET_BATCHED": f"{self.offset_batched:d}",
            "SCALE": _literal(self.scale),
            "PRODUCT_SCALE": _literal(self.scale / self.softcap if self.softcap else self.scale * _LOG2E),
        }
        if self.softcap:
            lines["SOFTCAP_LOG2E"] = _literal(self.softcap * _LOG2E)
        if self.dropout:
            lines["DROPOUT_SCALE"] = _literal(1.0 / (1.0 - self.dropout))
            lines["DROPOUT_THRESHOLD"] = f"{threshold(self.dropout)}u"
        return lines

    def flags(self) -> dict[str, bool]:
        """The HAS_... macros."""
        return {
            "HAS_BOUNDS": self.bounds,
            "HAS_PREFIX": self.prefix,
            "HAS_SEGMENTS": self.segments,
            "HAS_ALIBI": self.alibi,
            "HAS_RELATIVE_BIAS": self.relative_bias,
            "HAS_BIAS": bool(self.bias),
            "HAS_SINKS": self.sinks,
            "HAS_SOFTCAP": bool(self.softcap),
            "HAS_DROPOUT": bool(self.dropout),
        }


def features(
    problem: AttentionProblem,
    inputs: Mapping[str, mx.array],
    constants: Mapping[str, mx.array],
    *,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Features:
    """The static choices of a call, from its arrays by name (see `constant_arrays`)."""

    def batched(name: str) -> bool:
        return name in constants and constants[name].shape[0] > 1

    return Features(
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        group=problem.group,
        scale=float(scale),
        softcap=float(softcap or 0.0),
        dropout=float(dropout),
        bounds="row_bounds" in constants,
        prefix="prefix" in constants,
        segments="query_segments" in constants,
        alibi=problem.alibi,
        relative_bias=problem.relative_bias,
        bias=_dtype_name(inputs["bias"]) if problem.bias else "",
        sinks=problem.sinks,
        bounds_batched=batched("row_bounds"),
        prefix_batched=batched("prefix"),
        query_segments_batched=batched("query_segments"),
        key_segments_batched=batched("key_segments"),
        offset_batched=batched("query_offset"),
    )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The constants of one kernel that are not shared: its tile and what it computes."""

    block_queries: int
    block_keys: int
    simdgroups: int
    rows_in_registers: bool = False
    streamed_tiles: int = 2
    compute_dk: bool = True
    compute_dv: bool = True
    reduce_batch: bool = False
    reduce_heads: bool = False
    reduce_queries: bool = False
    reduce_keys: bool = False
    query_rows: int = 0
    heads_together: int = 1
    splits: int = 1
    partial: bool = False

    @staticmethod
    def of(tile: KernelTile, **more: Any) -> Shape:
        return Shape(
            block_queries=tile.block_queries,
            block_keys=tile.block_keys,
            simdgroups=tile.simdgroups,
            rows_in_registers=tile.resident == "registers",
            streamed_tiles=tile.streamed_tiles,
            **more,
        )

    @property
    def threads(self) -> int:
        return 32 * self.simdgroups


# Shape fields that the texts test with #if.
_SHAPE_MACROS = (
    "rows_in_registers", "streamed_tiles", "compute_dk", "compute_dv", "reduce_batch", "reduce_heads",
    "reduce_queries", "reduce_keys", "splits", "partial",
)  # fmt: skip


def header(features: Features, shape: Shape, *, decode: bool) -> str:
    """What stands in front of a kernel's function: the constants of the configuration, then header.metal."""
    macros: dict[str, int] = {name: int(value) for name, value in features.flags().items()}
    macros |= {name.upper(): int(getattr(shape, name)) for name in _SHAPE_MACROS}
    macros |= {"IS_DECODE": int(decode), "RELATIVE_BIAS_STAGED": int(not decode)}
    constants = features.constants()
    constants |= {
        f.name.upper(): str(int(getattr(shape, f.name))) for f in fields(shape) if f.name not in _SHAPE_MACROS
    }
    if decode:
        constants["HEAD_CHUNK"] = str(_chunk(features.head_dim, features.dtype, lanes=8))
        constants["VALUE_CHUNK"] = str(_chunk(features.value_dim, features.dtype, lanes=4))
    lines = [f"typedef {_METAL_TYPES[features.dtype]} element_t;"]
    if features.bias:
        lines.append(f"typedef {_METAL_TYPES[features.bias]} bias_t;")
    lines += [f"#define {name} {value}" for name, value in macros.items()]
    lines += [f"constant constexpr {_constant_type(value)} {name} = {value};" for name, value in constants.items()]
    return "\n".join(lines) + "\n" + _read("header.metal")


def _chunk(width: int, dtype: str, *, lanes: int) -> int:
    """Neighbouring elements that a lane loads at once in decode: up to 16 bytes, dividing the padded width by lanes.

    At least 2 for the four lanes of a value row, whose fragments take pairs.
    """
    padded = (width + 7) // 8 * 8
    size = 4 if dtype == "float32" else 8
    while size > 1 and padded % (lanes * size):
        size //= 2
    return size


def _literal(value: float) -> str:
    """A float literal of Metal."""
    text = repr(float(value))
    return f"{text}f" if any(c in text for c in ".en") else f"{text}.0f"


def _constant_type(value: str) -> str:
    if value.endswith("u"):
        return "uint"
    return "float" if value.endswith("f") else "int"


def _dtype_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


@cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="ascii")


_INCLUDE = re.compile(r'^#include "(\w+\.metal)"\n', re.MULTILINE)


@cache
def body(name: str) -> str:
    """The body of a kernel, with the parts that it includes put in."""
    return _INCLUDE.sub(lambda match: _read(match.group(1)), _read(f"{name}.metal"))


@cache
def kernel(
    name: str, features: Features, shape: Shape, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Callable[..., list[mx.array]]:
    """The kernel object of a configuration; MLX compiles it when it first runs."""
    return mx.fast.metal_kernel(
        name=f"mlxlm_attention_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=body(name),
        header=header(features, shape, decode=name.startswith("decode")),
        ensure_row_contiguous=False,
    )
