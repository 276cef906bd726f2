"""Do the kernels for one token compute rightly on this GPU? Each against plain MLX operations in float32.

`mlxlm doctor` runs it. On a Metal device that fails, fused steps are switched off (see `disabled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx

from mlxlm import runtime
from mlxlm.kernels.attention import attention, tuning
from mlxlm.kernels.attention.mask import AttentionMask
from mlxlm.kernels.attention.selfcheck import LIMITS, Check
from mlxlm.kernels.one_token.attend import attend
from mlxlm.kernels.one_token.product import Heads, Norm, Weight, product, projected_heads

_NAME = "one_token"
_INPUTS, _HEADS, _KV_HEADS, _DIM, _PLACE = 320, 6, 2, 64, 77

Pair = tuple[mx.array, mx.array]  # what a kernel found, and what is right in float32


def run() -> Iterator[Check]:
    """One check after another; none on the CPU, which has no such kernels."""
    if runtime.backend() == "cpu":
        return
    for dtype in LIMITS:
        kind = getattr(mx, dtype)
        cases: dict[str, Callable[[], Pair]] = {
            "norm, product, gate": lambda kind=kind: _gate(kind, 0),
            "4 bits": lambda kind=kind: _gate(kind, 4),
            "8 bits": lambda kind=kind: _gate(kind, 8),
            "heads": lambda kind=kind: _projected(kind, normed=False),
            "normed heads": lambda kind=kind: _projected(kind, normed=True),
            "attention": lambda kind=kind: _attention(kind, 256, _PLACE, None),
            "attention, window": lambda kind=kind: _attention(kind, 256, _PLACE, 9),
            "attention, split": lambda kind=kind: _attention(kind, 2304, 1800, None),
        }  # fmt: skip
        for name, case in cases.items():
            yield _compared(f"{name}, {dtype}", case, LIMITS[dtype])


def record_failures(checks: list[Check]) -> str:
    """Write to the device's record what failed; returns it, empty when all is well."""
    backend = runtime.backend()
    problem = "; ".join(f"{check.case}: {check.problem}" for check in checks if check.problem)[:500]
    known = tuning.record(backend)
    rest = {name: why for name, why in known.disabled.items() if name != _NAME}
    if problem or _NAME in known.disabled:
        tuning.write_record(backend, disabled=rest | ({_NAME: problem} if problem else {}), choices=known.choices)
    return problem


def disabled() -> str:
    """Why the kernels must not be used on this device, empty when nothing is known against them."""
    return str(tuning.record(runtime.backend()).disabled.get(_NAME, ""))


def _compared(name: str, case: Callable[[], Pair], limit: float) -> Check:
    try:
        found, right = case()
        error = (mx.abs(found.astype(mx.float32) - right).max() / mx.abs(right).max()).item()
    except Exception as error_:  # a compiler's refusal can be of any kind, and is what is looked for here
        text = " ".join(str(error_).split())[:300]
        return Check(case=name, implementation="fused", error=None, problem=f"{type(error_).__name__}: {text}")
    return Check(
        case=name, implementation="fused", error=error, problem="" if error <= limit else f"relative error {error:.1e}"
    )


def _normal(dtype: mx.Dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return (scale * mx.random.normal(shape, key=mx.random.key(seed + sum(shape)))).astype(dtype)


def _weight(dtype: mx.Dtype, rows: int, bits: int) -> tuple[Weight, mx.array]:
    """A weight and its numbers in float32."""
    own = _normal(dtype, rows, _INPUTS, scale=_INPUTS**-0.5)
    if not bits:
        return Weight(weight=own), own.astype(mx.float32)
    packed, scales, biases = mx.quantize(own, group_size=32, bits=bits)
    numbers = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=bits)
    return Weight(weight=packed, scales=scales, biases=biases, bits=bits, group_size=32), numbers


def _norm(width: int) -> Norm:
    return Norm(scale=1 + 0.1 * _normal(mx.float32, width, seed=1), eps=1e-5)


def _gate(dtype: mx.Dtype, bits: int) -> Pair:
    (weight, numbers), x, norm = _weight(dtype, 128, bits), _normal(dtype, _INPUTS), _norm(_INPUTS)
    gate, up = mx.split(numbers @ mx.fast.rms_norm(x.astype(mx.float32), norm.scale, norm.eps), 2)
    return product(x, weight, norm=norm, activation="silu", gated=True), gate * mx.sigmoid(gate) * up


def _projected(dtype: mx.Dtype, *, normed: bool) -> Pair:
    (weight, numbers), x = _weight(dtype, (_HEADS + 2 * _KV_HEADS) * _DIM, 0), _normal(dtype, _INPUTS)
    inverse = 10000.0 ** (-mx.arange(0, _DIM, 2) / _DIM)
    norms = (_norm(_DIM), _norm(_DIM)) if normed else None
    form = Heads(num_heads=_HEADS, num_kv_heads=_KV_HEADS, head_dim=_DIM, inverse=inverse)
    found = mx.concatenate(projected_heads(x, weight, form, mx.array([_PLACE], dtype=mx.int32), head_norms=norms))
    heads = (numbers @ x.astype(mx.float32)).reshape(1, -1, 1, _DIM)
    turned, rest = heads[:, : _HEADS + _KV_HEADS], heads[:, _HEADS + _KV_HEADS :]
    if norms is not None:
        turned = mx.fast.rms_norm(turned, norms[0].scale, norms[0].eps)
    angle = _PLACE * inverse
    first, second = mx.split(turned, 2, axis=-1)
    turned = mx.concatenate(
        [first * mx.cos(angle) - second * mx.sin(angle), second * mx.cos(angle) + first * mx.sin(angle)], axis=-1
    )
    return found, mx.concatenate([turned, rest], axis=1).reshape(-1)


def _attention(dtype: mx.Dtype, slots: int, place: int, window: int | None) -> Pair:
    query = _normal(dtype, _HEADS * _DIM)
    keys, values = (_normal(dtype, 1, _KV_HEADS, slots, _DIM, seed=seed) for seed in (2, 3))
    found = attend(query, keys, values, mx.array([place], dtype=mx.int32), scale=_DIM**-0.5, window=window)
    right = attention(
        query.reshape(1, _HEADS, 1, _DIM).astype(mx.float32),
        keys[:, :, : place + 1].astype(mx.float32),
        values[:, :, : place + 1].astype(mx.float32),
        scale=_DIM**-0.5,
        mask=AttentionMask(causal=True, window=window),
        implementation="reference",
    )
    return found, right.reshape(-1)
