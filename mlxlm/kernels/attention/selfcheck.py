"""Does attention compute rightly on this device? Every implementation against the reference, outputs and gradients.

`mlxlm doctor` runs it, and loading a model on a Metal device runs it once a MLX version. Kernels that fail, or that the
device's compiler refuses, are disabled for "auto" in the device's record (see `tuning`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxlm import runtime
from mlxlm.kernels.attention import attention, choice, tuning
from mlxlm.kernels.attention.mask import AttentionMask
from mlxlm.kernels.attention.problem import describe

# Largest error of outputs and gradients, relative to the largest value of the reference.
LIMITS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration. Lengths are of queries and keys, dims of query/key and value heads.

    mask: from batch and lengths.  modifiers: from heads and lengths; those that are arrays get gradients too.
    """

    name: str
    dtype: str = "float32"
    lengths: tuple[int, int] = (37, 53)
    dims: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (4, 2)
    mask: Callable[[int, int, int], AttentionMask] = lambda batch, q, k: AttentionMask(causal=True)
    modifiers: Callable[[int, int, int], dict[str, Any]] = lambda heads, q, k: {}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What came out. error: relative, None when it raised.  problem: what is wrong, empty when all is well."""

    case: str
    implementation: str
    error: float | None
    problem: str


def _segments(batch: int, q: int, k: int) -> AttentionMask:
    ids = mx.broadcast_to((mx.arange(k) // 11)[None], (batch, k))
    return AttentionMask(causal=True, query_segments=ids[:, k - q :], key_segments=ids)


def _lengths(batch: int, q: int, k: int) -> AttentionMask:
    return AttentionMask(key_lengths=mx.array([k, k // 2][:batch]))


def _prefix(batch: int, q: int, k: int) -> AttentionMask:
    return AttentionMask(causal=True, window=9, prefix_lengths=mx.array([5, 0][:batch]))


Modifiers = Callable[[int, int, int], dict[str, Any]]  # from heads and lengths
MODIFIERS: dict[str, Modifiers] = {
    "alibi": lambda heads, q, k: {"alibi_slopes": mx.array([2.0**-i for i in range(1, heads + 1)])},
    "relative_bias": lambda heads, q, k: {"relative_bias": mx.random.normal((heads, q + k - 1))},
    "dense_bias": lambda heads, q, k: {"bias": mx.random.normal((1, heads, q, k))},
    "softcap": lambda heads, q, k: {"softcap": 5.0},
    "sinks": lambda heads, q, k: {"sinks": mx.random.normal((heads,))},
}
CASES = (
    Case(name="causal"),
    *(Case(name=f"causal {dtype}", dtype=dtype, dims=(d, d)) for dtype in ("float16", "bfloat16") for d in (64, 128)),
    *(Case(name=f"head width {d}", dims=(d, e)) for d, e in ((32, 32), (80, 80), (96, 64), (128, 128), (256, 256))),
    Case(name="no mask, multi-query", heads=(3, 1), mask=lambda batch, q, k: AttentionMask()),
    Case(name="window", mask=lambda batch, q, k: AttentionMask(causal=True, window=7)),
    Case(name="segments", mask=_segments),
    Case(name="padding", mask=_lengths),
    Case(name="prefix and window", mask=_prefix),
    Case(name="rows without a key", mask=lambda batch, q, k: AttentionMask(key_lengths=mx.array([0, k][:batch]))),
    *(Case(name=name.replace("_", " "), modifiers=modifiers) for name, modifiers in MODIFIERS.items()),
    Case(name="dropout", modifiers=lambda heads, q, k: {"dropout": 0.2, "dropout_key": mx.random.key(3)}),
    Case(name="decoding", lengths=(1, 700)),
    Case(name="decoding bfloat16", lengths=(3, 300), dtype="bfloat16", dims=(128, 128), heads=(8, 2)),
)


def run(implementations: tuple[str, ...] | None = None, cases: tuple[Case, ...] = CASES) -> Iterator[Check]:
    """Check implementations one case after another; default all that this device can run.

    Cases that an implementation doesn't serve are passed over.
    """
    if implementations is None:
        module = choice.load("metal")
        on_metal = module is not None and module.available()
        implementations = ("metal", "mlx", "tiled") if on_metal else ("mlx", "tiled")
    for case in cases:
        arrays, keywords = _problem(case)
        expected = _values("reference", arrays, keywords, "float32")
        for implementation in implementations:
            if not _serves(implementation, arrays, keywords, case.dtype):
                continue
            yield _compare(case, implementation, arrays, keywords, expected)


def ensure_checked() -> None:
    """On a Metal device that has no record for this MLX version: check our kernels and write one. Else nothing."""
    if runtime.backend() != "metal" or tuning.record("metal").mlx:
        return
    print("checking the attention kernels on this device, once ...", file=sys.stderr)
    problem = record_failures(list(run(("metal",))))
    if problem:
        print(f"our Metal kernels are switched off here: {problem}; see mlxlm doctor", file=sys.stderr)


def record_failures(checks: list[Check]) -> str:
    """Write what failed of our Metal kernels to the device's record; returns it, empty when all is well."""
    backend = runtime.backend()
    failed = [check for check in checks if check.implementation == "metal" and check.problem]
    problem = "; ".join(f"{check.case}: {check.problem}" for check in failed[:3])
    known = tuning.record(backend)
    others = {name: why for name, why in known.disabled.items() if name != "metal"}
    tuning.write_record(backend, disabled=others | ({"metal": problem} if problem else {}), choices=known.choices)
    return problem


def _problem(case: Case) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays that get gradients, and the other keywords."""
    mx.random.seed(len(case.name))
    batch, (heads, kv_heads), (q, k), (dim, value_dim) = 2, case.heads, case.lengths, case.dims
    arrays = {
        "query": mx.random.normal((batch, heads, q, dim)),
        "key": mx.random.normal((batch, kv_heads, k, dim)),
        "value": mx.random.normal((batch, kv_heads, k, value_dim)),
    }
    modifiers = case.modifiers(heads, q, k)
    names = ("alibi_slopes", "relative_bias", "bias", "sinks")
    arrays |= {name: modifiers[name] for name in names if name in modifiers}
    keywords = {name: value for name, value in modifiers.items() if name not in names}
    # Rounded once, so that the reference sees what the kernels see.
    dtype = getattr(mx, case.dtype)
    arrays = {name: array.astype(dtype).astype(mx.float32) for name, array in arrays.items()}
    return arrays, {**keywords, "mask": case.mask(batch, q, k), "scale": dim**-0.5}


def _values(implementation: str, arrays: dict[str, mx.array], keywords: dict[str, Any], dtype: str) -> list[mx.array]:
    """Output and all gradients, float32."""
    given = {name: array.astype(getattr(mx, dtype)) for name, array in arrays.items()}

    def weighted(given: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        out = attention(**given, **keywords, implementation=implementation)
        weights = mx.cos(mx.arange(out.size, dtype=mx.float32)).reshape(out.shape)
        return (out.astype(mx.float32) * weights).sum(), out

    (_, out), gradients = mx.value_and_grad(weighted)(given)
    values = [out, *(gradients[name] for name in sorted(gradients))]
    values = [value.astype(mx.float32) for value in values]
    mx.eval(values)
    return values


def _serves(implementation: str, arrays: dict[str, mx.array], keywords: dict[str, Any], dtype: str) -> bool:
    modifiers = {"alibi_slopes": None, "relative_bias": None, "bias": None, "softcap": None, "sinks": None}
    modifiers |= {"dropout": 0.0, "dropout_key": None, "return_lse": False}
    given = {name: array.astype(getattr(mx, dtype)) for name, array in arrays.items()}
    modifiers |= {name: value for name, value in {**given, **keywords}.items() if name in modifiers}
    if implementation == "mlx" and modifiers["sinks"] is not None and runtime.backend() != "cpu":
        return False  # mx.fast has no gradient for sinks on GPUs
    try:
        choice.choose(implementation, given["query"], given["key"], given["value"], keywords["mask"], modifiers)
    except ValueError:
        return False
    return True


def _compare(
    case: Case, implementation: str, arrays: dict[str, mx.array], keywords: dict[str, Any], expected: list[mx.array]
) -> Check:
    try:
        values = _values(implementation, arrays, keywords, case.dtype)
    except Exception as error:  # a compiler's refusal can be of any kind, and is what is looked for here
        text = " ".join(str(error).split())[:300]
        return Check(
            case=case.name, implementation=implementation, error=None, problem=f"{type(error).__name__}: {text}"
        )
    errors = [
        (mx.abs(value - wanted).max() / mx.maximum(mx.abs(wanted).max(), 1e-6)).item()
        for value, wanted in zip(values, expected, strict=True)
    ]
    worst = max(errors, key=lambda error: error if error == error else float("inf"))  # NaN is worst
    problem = "" if worst <= LIMITS[case.dtype] else f"relative error {worst:.1e}"
    return Check(case=case.name, implementation=implementation, error=worst, problem=problem)


def tune(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
    lengths: tuple[int, ...],
    causal: bool = True,
    window: int | None = None,
    modifiers: tuple[str, ...] = (),
) -> Iterator[str]:
    """Time the implementations forward and backward on a model's shapes, and record the fastest of each.

    lengths: of queries and keys.  causal, window: the mask of the model's attention, which is timed with packed
    documents too where it is causal, with padded rows where it is not.  modifiers: names of MODIFIERS that it has.
    Yields a line a shape; the record is written at the end.
    """
    backend = runtime.backend()
    choices: dict[str, str] = dict(tuning.record(backend).choices)
    base = Case(
        name="tune", dtype=dtype, dims=(head_dim, value_dim), heads=(heads, kv_heads),
        modifiers=lambda *sizes: {k: v for name in modifiers for k, v in MODIFIERS[name](*sizes).items()},
    )  # fmt: skip
    for length in lengths:
        for name, mask in _tuned_masks(causal, window).items():
            arrays, keywords = _problem(replace(base, lengths=(length, length), mask=mask))
            times = {
                implementation: _seconds(implementation, arrays, keywords, dtype)
                for implementation in ("metal", "mlx", "tiled")
                if _serves(implementation, arrays, keywords, dtype)
            }
            best = min(times, key=lambda implementation: times[implementation])
            given = {name: array.astype(getattr(mx, dtype)) for name, array in arrays.items()} | keywords
            del given["scale"]
            choices[tuning.problem_key(describe(**given))] = best
            shown = ", ".join(f"{implementation} {1e3 * seconds:.1f} ms" for implementation, seconds in times.items())
            yield f"{', '.join((name, *modifiers))} {length}: {shown}; chosen: {best}"
    tuning.write_record(backend, disabled=tuning.record(backend).disabled, choices=choices)


def _tuned_masks(causal: bool, window: int | None) -> dict[str, Callable[[int, int, int], AttentionMask]]:
    """The masks that a model's attention meets, by name: alone, and with packed documents or padding."""
    own = AttentionMask(causal=causal, window=window)
    with_more = _segments if causal else _lengths
    name = own.describe()
    return {
        name: lambda batch, q, k: own,
        f"{name}, {'segments' if causal else 'padding'}": lambda batch, q, k: replace(
            with_more(batch, q, k), causal=causal, window=window
        ),
    }


def _seconds(implementation: str, arrays: dict[str, mx.array], keywords: dict[str, Any], dtype: str) -> float:
    _values(implementation, arrays, keywords, dtype)  # compiles
    times = []
    for _ in range(3):
        start = time.perf_counter()
        _values(implementation, arrays, keywords, dtype)
        times.append(time.perf_counter() - start)
    return min(times)
