"""Cases of attention to check kernels with, and what they should give: numpy in float64, from the formulas.

Shapes: B batch, H query heads, K key heads, L queries, S keys, D and E head widths.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlm.kernels.attention import AttentionMask, metal
from mlxlm.kernels.attention.device import DeviceProfile, metal_profile
from mlxlm.kernels.attention.launches import Split
from mlxlm.kernels.attention.metal import source
from mlxlm.kernels.attention.plan import TilePlan, plan
from mlxlm.kernels.attention.problem import AttentionProblem
from tools.metal_emulator import compiler
from tools.metal_emulator.session import Metal, emulated_metal

Numbers = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of attention. mask: a key of MASKS.  bias: a key of BIAS_SHAPES.  layout: of query, key and value.

    generation: of the Apple GPU whose tiles are used, 1 (M1) to 5 (M5).
    """

    dtype: str = "float32"
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 45
    keys: int = 70
    head_dim: int = 16
    value_dim: int = 16
    mask: str = "plain"
    alibi: bool = False
    relative_bias: bool = False
    bias: str = "none"
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    layout: str = "BHLD"
    generation: int = 1

    def __str__(self) -> str:
        default = Case()
        different = [
            f"{name}={value}" if not isinstance(value, bool) else name
            for name, value in vars(self).items()
            if value != getattr(default, name)
        ]
        return ",".join(different) or "plain"


# Each makes the fields of an AttentionMask for a case, as numbers and numpy arrays.
MASKS: dict[str, Callable[[Case, np.random.Generator], dict[str, Any]]] = {
    "plain": lambda c, r: {},
    "causal": lambda c, r: {"causal": True},
    "window": lambda c, r: {"causal": True, "window": 9},
    "two-sided window": lambda c, r: {"window": 6, "query_offset": r.integers(0, c.keys, c.batch)},
    "prefix": lambda c, r: {"causal": True, "prefix_lengths": r.integers(0, c.keys, c.batch)},
    "prefix+window": lambda c, r: {"causal": True, "window": 5, "prefix_lengths": r.integers(0, c.keys, c.batch)},
    "lengths": lambda c, r: {"key_lengths": _some(r, c.keys + 1, c.batch)},
    "segments": lambda c, r: {"causal": True, **_segments(c, r, in_order=True)},
    "mixed segments": lambda c, r: _segments(c, r, in_order=False),
    "nothing visible": lambda c, r: {
        "causal": True, "query_offset": -c.queries // 2, "key_lengths": _some(r, 9, c.batch),
    },
    "everything": lambda c, r: {
        "causal": True, "window": max(1, c.keys // 3), "prefix_lengths": r.integers(0, c.keys, c.batch),
        "key_lengths": _some(r, c.keys + 1, c.batch), **_segments(c, r, in_order=False),
    },
}  # fmt: skip

BIAS_SHAPES: dict[str, Callable[[Case], tuple[int, ...]]] = {
    "BHLS": lambda c: (c.batch, c.heads, c.queries, c.keys),
    "HLS": lambda c: (c.heads, c.queries, c.keys),
    "B1LS": lambda c: (c.batch, 1, c.queries, c.keys),
    "LS": lambda c: (c.queries, c.keys),
    "B11S": lambda c: (c.batch, 1, 1, c.keys),
    "H1S": lambda c: (c.heads, 1, c.keys),
    "BHL1": lambda c: (c.batch, c.heads, c.queries, 1),
    "1": lambda c: (1,),
}


def _some(rng: np.random.Generator, high: int, count: int) -> np.ndarray:
    """Lengths of which the first is 0."""
    return np.where(np.arange(count) == 0, 0, rng.integers(1, high, count))


def _segments(case: Case, rng: np.random.Generator, in_order: bool) -> dict[str, Any]:
    """Ids of three documents; packed in order for queries that are the last of the keys, or in any order."""
    if in_order:
        ids = np.sort(rng.integers(0, 3, (case.batch, max(case.keys, case.queries))), axis=1) * 7 - 3
        return {"query_segments": ids[:, -case.queries :], "key_segments": ids[:, -case.keys :]}
    ids = rng.integers(0, 4, (case.batch, case.queries)), rng.integers(1, 3, (1, case.keys))
    return {"query_segments": ids[0], "key_segments": ids[1]}


@dataclass(kw_only=True)
class Data:
    """The arrays of a case. inputs: differentiable ones by argument name, in their dtype.  mask: fields of the mask."""

    case: Case
    inputs: dict[str, mx.array]
    mask: dict[str, Any]
    scale: float
    softcap: float | None
    dropout: float
    dropout_key: mx.array | None
    out_gradient: mx.array
    lse_gradient: np.ndarray
    exact: Numbers = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """What `attention` takes besides the inputs."""
        fields = {k: mx.array(v) if isinstance(v, np.ndarray) else v for k, v in self.mask.items()}
        return {
            "scale": self.scale, "mask": AttentionMask(**fields), "softcap": self.softcap, "dropout": self.dropout,
            "dropout_key": self.dropout_key, "return_lse": True,
        }  # fmt: skip


def make(case: Case, seed: int = 0) -> Data:
    """Random data of a case, and its exact results."""
    rng = np.random.default_rng([seed, *str(case).encode()])
    dtype = getattr(mx, case.dtype)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)

    def heads_of(count: int, length: int, width: int) -> mx.array:
        if case.layout == "BHLD":
            return normal(case.batch, count, length, width)
        if case.layout == "BLHD":
            return normal(case.batch, length, count, width).transpose(0, 2, 1, 3)
        return normal(case.batch, count, width, length).swapaxes(2, 3)

    inputs = {
        "query": heads_of(case.heads, case.queries, case.head_dim),
        "key": heads_of(case.kv_heads, case.keys, case.head_dim),
        "value": heads_of(case.kv_heads, case.keys, case.value_dim),
    }
    if case.alibi:
        inputs["alibi_slopes"] = mx.array(0.5 ** (1 + np.arange(case.heads))).astype(dtype)
    if case.relative_bias:
        inputs["relative_bias"] = normal(case.heads, case.queries + case.keys - 1)
    if case.bias != "none":
        inputs["bias"] = normal(*BIAS_SHAPES[case.bias](case))
    if case.sinks:
        inputs["sinks"] = normal(case.heads)
    data = Data(
        case=case, inputs=inputs, mask=MASKS[case.mask](case, rng), scale=1.3 * case.head_dim**-0.5,
        softcap=2.5 if case.softcap else None, dropout=0.3 if case.dropout else 0.0,
        dropout_key=mx.random.key(5) if case.dropout else None,
        out_gradient=normal(case.batch, case.heads, case.queries, case.value_dim),
        lse_gradient=rng.standard_normal((case.batch, case.heads, case.queries), dtype=np.float32),
    )  # fmt: skip
    data.exact = exact(data)
    return data


Attention = Callable[..., Any]


@contextmanager
def emulated_attention(
    *,
    generation: int = 1,
    splits: Mapping[str, Split] | None = None,
    seed: int = 0,
    collecting: bool = False,
    keeping: bool = False,
) -> Iterator[Metal]:
    """Our Metal kernels on the emulator, with the tiles of an Apple GPU of that generation (1: M1).

    splits: launches by the name of a kernel, instead of those that the plan has for it.
    """

    def profile(backend: str) -> DeviceProfile:
        return metal_profile(f"applegpu_g{12 + generation}g")

    def planned(problem: AttentionProblem, device: DeviceProfile) -> TilePlan:
        found = plan(problem, device)
        decode = found.decode
        if decode and splits and splits.get("decode", Split()).keys > 1:
            decode = replace(decode, splits=max(2, decode.splits))  # as the plan has it for keys that are cut
        return replace(found, splits=splits or {}, decode=decode)

    real, metal.device_profile, metal.plan = metal.device_profile, profile, planned
    source.kernel.cache_clear()
    try:
        with emulated_metal(seed=seed, collecting=collecting, keeping=keeping) as device:
            yield device
    finally:
        metal.device_profile, metal.plan = real, plan
        source.kernel.cache_clear()


def build(cases: Sequence[Case]) -> None:
    """Build the kernels that the cases need, all at once."""
    kernels = {}
    for case in cases:
        with emulated_attention(generation=case.generation, collecting=True) as device:
            results(metal.attention, make(case))
        kernels |= device.kernels
    compiler.engine()
    compiler.build(kernels.values())


def emulated_results(case: Case, *, seed: int = 0) -> tuple[dict[str, float], Metal]:
    """Errors of all results of a case on the emulator, and the device with the counters of its dispatches."""
    data = make(case)
    with emulated_attention(generation=case.generation, seed=seed) as device:
        found = results(metal.attention, data)
    return errors(found, data.exact), device


def results(attention: Attention, data: Data, dtype: mx.Dtype | None = None) -> Numbers:
    """Output, log-sum-exp and all gradients of an implementation, under the names of `exact`.

    dtype: to convert query, key, value and the output's gradient to; default their own.
    """
    names = list(data.inputs)
    arguments = data.arguments()

    def call(*arrays: mx.array) -> list[mx.array]:
        given = dict(zip(names, arrays, strict=True))
        return list(attention(given.pop("query"), given.pop("key"), given.pop("value"), **given, **arguments))

    arrays = [a if dtype is None else a.astype(dtype) for a in data.inputs.values()]
    out_gradient = data.out_gradient if dtype is None else data.out_gradient.astype(dtype)
    outputs, gradients = mx.vjp(call, arrays, [out_gradient, mx.array(data.lse_gradient)])
    found = dict(zip(("out", "lse"), outputs, strict=True)) | dict(zip(names, gradients, strict=True))
    return {name: _float64(array) for name, array in found.items()}


def errors(found: Numbers, exact: Numbers) -> dict[str, float]:
    """Largest error of each result relative to its largest number; infinite for a NaN or a misplaced infinity."""
    worst = {}
    for name, right in exact.items():
        finite = np.isfinite(right)
        scale = float(np.abs(right[finite]).max(initial=0.0)) or 1.0
        with np.errstate(invalid="ignore"):
            difference = np.where(finite, np.abs(found[name] - np.where(finite, right, 0.0)), 0.0)
        same_infinities = found[name].shape == right.shape and np.array_equal(found[name][~finite], right[~finite])
        worst[name] = float(difference.max()) / scale if same_infinities and np.isfinite(difference).all() else np.inf
    return worst


def _float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


# ------------------------------------------------------------------------------------------------ in float64


def exact(data: Data) -> Numbers:
    """Output, log-sum-exp and the gradients of all inputs in float64, from the inputs as they were rounded."""
    case, given = data.case, {name: _float64(array) for name, array in data.inputs.items()}
    B, H, L, S, G = case.batch, case.heads, case.queries, case.keys, case.heads // case.kv_heads
    query, key, value = given["query"], given["key"].repeat(G, axis=1), given["value"].repeat(G, axis=1)
    position = np.broadcast_to(np.asarray(data.mask.get("query_offset", S - L)).reshape(-1, 1), (B, 1)) + np.arange(L)
    distance = np.abs(position[:, None, :, None] - np.arange(S))
    diagonal = np.arange(S) - np.arange(L)[:, None] + L - 1

    product = data.scale * query @ key.swapaxes(-1, -2)
    capped = np.tanh(product / data.softcap) if data.softcap else None
    score = product if capped is None else data.softcap * capped
    if case.alibi:
        score = score - given["alibi_slopes"][:, None, None] * distance
    if case.relative_bias:
        score = score + given["relative_bias"][:, diagonal]
    if case.bias != "none":
        score = score + given["bias"]
    seen = visible(data, position)
    score = np.where(seen, score, -np.inf)
    empty = ~seen.any(axis=-1, keepdims=True) | np.zeros((B, H, 1, 1), dtype=bool)
    sink = np.exp(given["sinks"])[:, None, None] if case.sinks else 0.0
    total = np.where(empty, 1.0, np.exp(score).sum(axis=-1, keepdims=True) + sink)
    weight = np.exp(score) / total
    kept = np.ones((B, H, L, S)) if data.dropout_key is None else _kept(data)
    out = (weight * kept) @ value
    lse = np.where(empty, np.inf, np.log(total))[..., 0]

    out_gradient = _float64(data.out_gradient)
    delta = (out_gradient * out).sum(axis=-1, keepdims=True) - np.where(empty, 0.0, data.lse_gradient[..., None])
    score_gradient = weight * (kept * (out_gradient @ value.swapaxes(-1, -2)) - delta)
    product_gradient = score_gradient if capped is None else score_gradient * (1.0 - capped**2)
    found = {"out": out, "lse": lse, "query": data.scale * product_gradient @ key}
    for_key = data.scale * product_gradient.swapaxes(-1, -2) @ query
    for_value = (weight * kept).swapaxes(-1, -2) @ out_gradient
    found["key"] = for_key.reshape(B, case.kv_heads, G, S, -1).sum(axis=2)
    found["value"] = for_value.reshape(B, case.kv_heads, G, S, -1).sum(axis=2)
    if case.alibi:
        found["alibi_slopes"] = -(score_gradient * distance).sum(axis=(0, 2, 3))
    if case.relative_bias:
        found["relative_bias"] = np.zeros((H, L + S - 1))
        np.add.at(found["relative_bias"], (slice(None), diagonal), score_gradient.sum(axis=0))
    if case.bias != "none":
        found["bias"] = _sum_to(score_gradient, given["bias"].shape)
    if case.sinks:
        found["sinks"] = -np.where(empty, 0.0, sink / total * delta).sum(axis=(0, 2, 3))
    return found


def visible(data: Data, position: np.ndarray) -> np.ndarray:
    """Which keys each query sees, bool (B, 1, L, S), by the definition. position (B, L): of the queries."""
    mask, keys = data.mask, np.arange(data.case.keys)
    ahead = position[:, None, :, None]
    seen = np.ones((data.case.batch, 1, data.case.queries, data.case.keys), dtype=bool)
    if mask.get("causal"):
        seen &= keys <= ahead
    if "window" in mask:
        seen &= np.abs(ahead - keys) < mask["window"]
    if "prefix_lengths" in mask:
        seen |= keys < mask["prefix_lengths"].reshape(-1, 1, 1, 1)
    if "key_lengths" in mask:
        seen &= keys < mask["key_lengths"].reshape(-1, 1, 1, 1)
    if "query_segments" in mask:
        seen &= mask["query_segments"][:, None, :, None] == mask["key_segments"][:, None, None, :]
    return seen


def _kept(data: Data) -> np.ndarray:
    """1 / (1 - rate) where dropout keeps a weight, else 0; the hash of dropout.py in numpy."""
    case = data.case
    key = np.array(data.dropout_key)

    def mix(x: np.ndarray) -> np.ndarray:
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(0x7FEB352D)
        x = x ^ (x >> np.uint32(15))
        x = x * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    head = np.arange(case.batch * case.heads, dtype=np.uint32).reshape(case.batch, case.heads, 1, 1)
    row = mix(mix(mix(head + key[0]) ^ key[1]) + np.arange(case.queries, dtype=np.uint32)[:, None])
    word = mix(row ^ (np.arange(case.keys, dtype=np.uint32) * np.uint32(0x9E3779B9)))
    return np.where(word >= np.uint32(int(data.dropout * 2**32)), 1.0 / (1.0 - data.dropout), 0.0)


def _sum_to(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    padded = (1,) * (array.ndim - len(shape)) + tuple(shape)
    axes = tuple(i for i, (have, want) in enumerate(zip(array.shape, padded, strict=True)) if have != want)
    return array.sum(axis=axes, keepdims=True).reshape(shape)


# -------------------------------------------------------------------------------------------- which cases

_SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 33, "keys": 47}

# Each part of the contract by itself.
ALONE = (
    [Case(mask=name) for name in MASKS]
    + [Case(mask="causal", **{name: True}) for name in ("alibi", "relative_bias", "softcap", "sinks", "dropout")]
    + [Case(mask="causal", bias=name) for name in BIAS_SHAPES]
    + [Case(mask="causal", kv_heads=count) for count in (1, 4)]
    + [Case(mask="causal", layout=name) for name in ("BLHD", "BHDL")]
    + [Case(queries=1, keys=1), Case(queries=130, keys=9), Case(queries=32, keys=64, mask="causal")]
)

# Few queries against many keys: the decode kernel, with and without splits of the keys.
DECODE = [
    Case(queries=1, keys=40),
    Case(queries=2, keys=300, mask="lengths", layout="BLHD"),
    Case(batch=1, queries=1, keys=700, kv_heads=1, mask="causal", dtype="bfloat16", head_dim=128, value_dim=128,
         layout="BLHD"),
    Case(batch=1, queries=1, keys=700, heads=8, kv_heads=1, mask="window", sinks=True, head_dim=64, value_dim=64),
    Case(batch=1, queries=3, keys=600, kv_heads=4, mask="prefix+window", dtype="float16", head_dim=80, value_dim=96),
    Case(queries=8, keys=600, kv_heads=4, mask="everything", alibi=True, relative_bias=True, bias="BHLS", softcap=True,
         sinks=True, dropout=True, head_dim=20, value_dim=33),
    Case(queries=5, keys=530, mask="nothing visible", sinks=True),
]  # fmt: skip

# Kernels in several launches, cut along every axis that they can be cut along, and where results add up in float32.
CUT = {
    "forward": Split(batch=2, kv_heads=2, queries=2),
    "delta": Split(batch=2, kv_heads=2, queries=3),
    "query_gradient": Split(batch=2, kv_heads=2, queries=2, keys=2),
    "key_value_gradient": Split(batch=2, kv_heads=2, queries=2, keys=3),
    "bias_gradient": Split(batch=2, kv_heads=2, queries=2, keys=3),
    "relative_bias_gradient": Split(batch=2, kv_heads=2, queries=2),
    "decode": Split(batch=2, kv_heads=2, keys=3),
}
FOR_CUTS = [
    Case(mask="everything", alibi=True, relative_bias=True, bias=bias, sinks=True, dropout=True, dtype=dtype,
         queries=queries)
    for bias, dtype, queries in (("BHLS", "float32", 45), ("B11S", "bfloat16", 45), ("LS", "float16", 3))
]  # fmt: skip

# Every head width in every dtype on an early and a late GPU: each row of the tile table.
WIDTHS = [
    Case(dtype=dtype, head_dim=head_dim, value_dim=value_dim, mask="causal", generation=generation, **_SMALL)
    for dtype in ("float32", "float16", "bfloat16")
    for generation in (1, 3)
    for head_dim, value_dim in (
        (8, 8), (32, 32), (64, 64), (72, 72), (80, 80), (96, 96), (112, 112), (128, 128), (160, 160), (192, 128),
        (256, 256), (40, 256),
    )
]  # fmt: skip

_LEVELS = {
    "dtype": ("float32", "float16", "bfloat16"),
    "mask": ("two-sided window", "prefix+window", "lengths", "segments", "nothing visible", "everything"),
    "alibi": (False, True),
    "relative_bias": (False, True),
    "bias": ("none", "BHLS", "B11S"),
    "softcap": (False, True),
    "sinks": (False, True),
    "dropout": (False, True),
    "kv_heads": (1, 4),
    "head_dim": (16, 20),
    "value_dim": (16, 33),
    "layout": ("BHLD", "BLHD", "BHDL"),
    "generation": (1, 3),
    "queries": (45, 3),
}


# ------------------------------------------------------------------------------------------ pairwise matrices


def pairwise(levels: dict[str, Sequence[Any]], seed: int = 0, *, base: Case | None = None) -> list[Case]:
    """Cases in which every two values of every two fields meet at least once, greedily few of them."""
    rng = random.Random(seed)
    names = list(levels)
    open_pairs = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in levels[a] for y in levels[b]}

    def covered(row: dict[str, Any]) -> set[tuple[str, Any, str, Any]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)} & open_pairs

    cases = []
    while open_pairs:
        a, x, b, y = min(open_pairs, key=repr)
        rows = [{n: rng.choice(list(levels[n])) for n in names} | {a: x, b: y} for _ in range(60)]
        best = max(rows, key=lambda row: len(covered(row)))
        open_pairs -= covered(best)
        cases.append(replace(base or Case(), **best))
    return cases


# Few cases in which every two choices meet, and more of them with every mask, bias and tile.
PAIRS = pairwise(_LEVELS)
MANY_PAIRS = pairwise(
    _LEVELS
    | {
        "kv_heads": (1, 2, 4),
        "mask": tuple(MASKS),
        "bias": ("none", *BIAS_SHAPES),
        "head_dim": (8, 20, 64, 72, 80, 96, 112, 128, 160, 192, 256),
        "value_dim": (8, 33, 64, 80, 128, 256),
        "queries": (1, 5, 33, 64, 97),
        "keys": (9, 31, 64, 150),
    },
    seed=1,
)
