"""Attention in float64 numpy, element by element from the contract: independent of every implementation.

Also the mask kinds and score modifiers that the attention tests run through. Sizes here are tiny and odd on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlm.kernels import AttentionMask

Options = dict[str, Any]


def visible(mask: AttentionMask, b: int, i: int, j: int, L: int, S: int) -> bool:
    """Whether query i of batch row b sees key j."""

    def of_row(field: Any) -> Any:
        values = np.array(field)
        return values if values.ndim == 0 else values[b if len(values) > 1 else 0]

    p = i + (S - L if mask.query_offset is None else int(of_row(mask.query_offset)))
    seen = True
    if mask.causal:
        seen = j <= p
    if mask.window is not None:
        seen = seen and (p - mask.window < j <= p if mask.causal else p - mask.window < j < p + mask.window)
    if mask.prefix_lengths is not None:
        seen = seen or j < of_row(mask.prefix_lengths)
    if mask.key_lengths is not None:
        seen = seen and j < of_row(mask.key_lengths)
    if mask.query_segments is not None:
        seen = seen and of_row(mask.query_segments)[i] == of_row(mask.key_segments)[j]
    return bool(seen)


def kept(key: np.ndarray, rate: float, b: int, h: int, q: int, k: int, H: int) -> bool:
    """The dropout hash of the README in Python integers."""
    word = 2**32

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % word
        x ^= x >> 15
        x = x * 0x846CA68B % word
        return x ^ (x >> 16)

    row = mix((mix(mix((b * H + h + int(key[0])) % word) ^ int(key[1])) + q) % word)
    return mix(row ^ (k * 0x9E3779B9 % word)) >= min(int(rate * word), word - 1)


def attention64(arrays: dict[str, np.ndarray], mask: AttentionMask, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Output (B, H, L, E) and natural log-sum-exp (B, H, L). arrays: float64 by the door's names; options: the rest."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    B, H, L, D = query.shape
    K, S, E = value.shape[1:]
    scale, softcap = options.get("scale") or D**-0.5, options.get("softcap")
    rate = options.get("dropout", 0.0)
    dropout_key = np.array(options["dropout_key"]) if rate else None
    bias = np.broadcast_to(arrays["bias"], (B, H, L, S)) if "bias" in arrays else None
    out, lse = np.zeros((B, H, L, E)), np.full((B, H, L), math.inf)
    offsets = np.broadcast_to(S - L if mask.query_offset is None else np.array(mask.query_offset), (B,))
    for b in range(B):
        for h in range(H):
            g = h // (H // K)
            for i in range(L):
                keys = [j for j in range(S) if visible(mask, b, i, j, L, S)]
                if not keys:
                    continue
                scores = []
                for j in keys:
                    s = scale * float(query[b, h, i] @ key[b, g, j])
                    if softcap is not None:
                        s = softcap * math.tanh(s / softcap)
                    if "alibi_slopes" in arrays:
                        s -= arrays["alibi_slopes"][h] * abs(i + int(offsets[b]) - j)
                    if "relative_bias" in arrays:
                        s += arrays["relative_bias"][h, j - i + L - 1]
                    if bias is not None:
                        s += bias[b, h, i, j]
                    scores.append(s)
                logits = [*scores, arrays["sinks"][h]] if "sinks" in arrays else scores
                top = max(logits)
                lse[b, h, i] = top + math.log(sum(math.exp(s - top) for s in logits))
                for j, s in zip(keys, scores, strict=True):
                    if not rate or kept(dropout_key, rate, b, h, i, j, H):
                        out[b, h, i] += math.exp(s - lse[b, h, i]) / (1.0 - rate) * value[b, g, j]
    return out, lse


def _segments(length: int) -> mx.array:
    """Two batch rows of ids, the second one not contiguous."""
    return mx.stack([mx.arange(length) // 3, mx.arange(length) % 2])


# name -> (B=2, Lq, Lk) -> mask.
MASKS: dict[str, Callable[[int, int], AttentionMask]] = {
    "none": lambda L, S: AttentionMask(),
    "causal": lambda L, S: AttentionMask(causal=True),
    "causal-offset": lambda L, S: AttentionMask(causal=True, query_offset=2),
    "causal-negative-offset": lambda L, S: AttentionMask(causal=True, query_offset=-2),
    "causal-offset-array": lambda L, S: AttentionMask(causal=True, query_offset=mx.array([0, S - L])),
    "causal-offset-scalar-array": lambda L, S: AttentionMask(causal=True, query_offset=mx.array(1)),
    "causal-window": lambda L, S: AttentionMask(causal=True, window=2),
    "window": lambda L, S: AttentionMask(window=2),
    "prefix": lambda L, S: AttentionMask(causal=True, query_offset=0, prefix_lengths=mx.array([2, 0])),
    "prefix-window": lambda L, S: AttentionMask(causal=True, window=2, prefix_lengths=mx.array([1, 3])),
    "lengths": lambda L, S: AttentionMask(key_lengths=mx.array([S - 1, 0])),
    "segments": lambda L, S: AttentionMask(causal=True, query_segments=_segments(L), key_segments=_segments(S)),
    "everything": lambda L, S: AttentionMask(
        causal=True, query_offset=mx.array([1, S - L]), window=3, prefix_lengths=mx.array([1, 2]),
        key_lengths=mx.array([S, S - 2]), query_segments=_segments(L), key_segments=_segments(S),
    ),
}  # fmt: skip


def modifiers(H: int, L: int, S: int) -> dict[str, Options]:
    """name -> keyword arguments of the door, for B=2; drawn from MLX's random state."""
    return {
        "unmodified": {},
        "scale": {"scale": 0.7},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": mx.random.uniform(0.1, 0.5, (H,))},
        "relative-bias": {"relative_bias": mx.random.normal((H, L + S - 1))},
        "dense-bias": {"bias": mx.random.normal((2, H, L, S))},
        "key-bias": {"bias": mx.random.normal((2, 1, 1, S))},
        "row-bias": {"bias": mx.random.normal((L, 1))},
        "sinks": {"sinks": mx.random.normal((H,))},
        "dropout": {"dropout": 0.3, "dropout_key": mx.random.key(5)},
    }


def inputs(
    H: int = 4, K: int = 2, L: int = 5, S: int = 7, D: int = 8, E: int = 6, dtype: mx.Dtype = mx.float32, seed: int = 0
) -> dict[str, mx.array]:
    """query, key and value for B=2."""
    mx.random.seed(seed)
    shapes = {"query": (2, H, L, D), "key": (2, K, S, D), "value": (2, K, S, E)}
    return {name: mx.random.normal(shape).astype(dtype) for name, shape in shapes.items()}


def split(arrays: dict[str, mx.array], options: Options) -> tuple[dict[str, mx.array], Options]:
    """Differentiable arrays of a call, and its other keyword arguments."""
    given = {name: value for name, value in options.items() if isinstance(value, mx.array) and name != "dropout_key"}
    return arrays | given, {name: value for name, value in options.items() if name not in given}


def as_float64(arrays: dict[str, mx.array]) -> dict[str, np.ndarray]:
    return {name: np.array(array.astype(mx.float32)).astype(np.float64) for name, array in arrays.items()}


def relative_error(got: mx.array, expected: mx.array | np.ndarray) -> float:
    """Largest difference over largest expected magnitude (at least 0.1); NaN counts as infinite."""
    got, expected = (
        np.array(a.astype(mx.float32) if isinstance(a, mx.array) else a).astype(np.float64) for a in (got, expected)
    )
    finite = np.isfinite(expected)
    if not (np.array_equal(np.isfinite(got), finite) and np.array_equal(got[~finite], expected[~finite])):
        return math.inf
    scale = max(float(np.abs(expected[finite]).max(initial=0.0)), 0.1)
    return float(np.abs(got[finite] - expected[finite]).max(initial=0.0)) / scale
