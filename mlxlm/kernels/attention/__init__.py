"""Scaled dot-product attention behind one door.

`attention` checks its arguments and hands them to one of several implementations with the same results: "metal"
(our kernels for Apple GPUs), "mlx" (mx.fast), "tiled" (linear memory in plain MLX operations) and "reference"
(dense float32). README.md in this folder holds the maths, the tiling and what is verified how.
"""

from __future__ import annotations

import mlx.core as mx

from mlxlm.errors import AttentionError
from mlxlm.kernels.attention.choice import IMPLEMENTATIONS, choose, forced_by_environment, is_mlx_decoding, load
from mlxlm.kernels.attention.mask import AttentionMask, Intervals

__all__ = ["IMPLEMENTATIONS", "AttentionMask", "Intervals", "attention"]

_NO_MASK = AttentionMask()
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    *,
    scale: float | None = None,
    mask: AttentionMask | None = None,
    alibi_slopes: mx.array | None = None,
    relative_bias: mx.array | None = None,
    bias: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    dropout: float = 0.0,
    dropout_key: mx.array | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """softmax(score) @ value, where with query position p = i + query_offset and distance |p - j|

        score = scale * q.k -> softcap * tanh(score / softcap) -> - alibi_slopes[h] * distance
                -> + relative_bias[h, j - i + Lq - 1] -> + bias -> mask

    query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), with H a multiple of Hkv (query heads h*H/Hkv and
    following share key head h); all float32, float16 or bfloat16. Returns (B, H, Lq, Dv) in that dtype.

    scale: default D ** -0.5.  mask: `AttentionMask`, default none.  alibi_slopes (H,).  relative_bias (H, Lq+Lk-1).
    bias: broadcastable to (B, H, Lq, Lk).  softcap: bound of the scores.  sinks (H,): one more logit for each row
    that holds no value.  dropout: share of attention weights to drop, 0 <= dropout < 1; needs dropout_key, an
    mx.random key; the same key gives the same bits in every implementation.
    implementation: "auto", or one of IMPLEMENTATIONS to force it; the environment variable MLXLM_ATTENTION forces
    one for all calls left at "auto" (read once).
    return_lse: also return the natural logarithm of the sum of exponentials of each row, float32 (B, H, Lq).

    A query that sees no key gives output 0, lse +inf and zero gradients. Differentiable in query, key, value,
    alibi_slopes, relative_bias, bias and sinks. Raises AttentionError for arguments that don't fit together and for a
    forced implementation that can't serve them.
    """
    if mask is None:
        mask = _NO_MASK
    _check(query, key, value, mask)
    if scale is None:
        scale = query.shape[3] ** -0.5
    if implementation == "auto":
        implementation = forced_by_environment()
    modified = (
        alibi_slopes is not None
        or relative_bias is not None
        or bias is not None
        or softcap is not None
        or sinks is not None
        or dropout != 0.0
    )
    if modified:
        _check_modifiers(
            query, key, alibi_slopes=alibi_slopes, relative_bias=relative_bias, bias=bias, softcap=softcap,
            sinks=sinks, dropout=dropout, dropout_key=dropout_key,
        )  # fmt: skip
    elif implementation == "auto" and not return_lse and is_mlx_decoding(query, key, mask):
        # The commonest call of all, once a layer and token: the general way below would take the same choice.
        return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale)
    modifiers = {
        "alibi_slopes": alibi_slopes, "relative_bias": relative_bias, "bias": bias, "softcap": softcap, "sinks": sinks,
        "dropout": dropout, "dropout_key": dropout_key, "return_lse": return_lse,
    }  # fmt: skip
    name = choose(implementation, query, key, value, mask, modifiers)
    return load(name).attention(query, key, value, scale=scale, mask=mask, **modifiers)


def _check(query: mx.array, key: mx.array, value: mx.array, mask: AttentionMask) -> None:
    """Raise AttentionError unless the three arrays and the mask fit together."""
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    fits = (
        len(query_shape) == len(key_shape) == len(value_shape) == 4
        and query_shape[0] == key_shape[0] == value_shape[0]
        and key_shape[1] == value_shape[1]
        and key_shape[2] == value_shape[2]
        and query_shape[3] == key_shape[3]
        and 0 not in query_shape
        and 0 not in value_shape
        and query_shape[1] % key_shape[1] == 0
    )
    if not fits:
        raise AttentionError(
            f"query {query_shape}, key {key_shape} and value {value_shape} don't fit together; expected "
            "(B, H, Lq, D), (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv) with H a multiple of Hkv and nothing empty"
        )
    dtype = query.dtype
    if dtype not in _DTYPES or key.dtype != dtype or value.dtype != dtype:
        kinds = ", ".join(str(a.dtype).removeprefix("mlx.core.") for a in (query, key, value))
        raise AttentionError(
            f"query, key and value are {kinds}; expected one dtype for all, float32, float16 or bfloat16"
        )
    if not isinstance(mask, AttentionMask):
        raise AttentionError(f"mask is a {type(mask).__name__}; expected an AttentionMask (add an array by `bias=`)")
    if mask.has_arrays:
        mask.validate(query_shape[0], query_shape[2], key_shape[2])


def _check_modifiers(
    query: mx.array,
    key: mx.array,
    *,
    alibi_slopes: mx.array | None,
    relative_bias: mx.array | None,
    bias: mx.array | None,
    softcap: float | None,
    sinks: mx.array | None,
    dropout: float,
    dropout_key: mx.array | None,
) -> None:
    """Raise AttentionError unless every score modifier fits query (B, H, Lq, D) and key (B, Hkv, Lk, D)."""
    B, H, L, _ = query.shape
    S = key.shape[2]
    for name, given, shape in (
        ("alibi_slopes", alibi_slopes, (H,)),
        ("relative_bias", relative_bias, (H, L + S - 1)),
        ("sinks", sinks, (H,)),
    ):
        if given is not None and given.shape != shape:
            raise AttentionError(f"{name} has shape {given.shape}; expected {shape}")
    for name, given in (("alibi_slopes", alibi_slopes), ("relative_bias", relative_bias), ("sinks", sinks)):
        _check_floating(name, given)
    if bias is not None:
        _check_floating("bias", bias)
        padded = (1,) * (4 - bias.ndim) + bias.shape
        if bias.ndim > 4 or any(have not in (1, want) for have, want in zip(padded, (B, H, L, S), strict=True)):
            raise AttentionError(f"bias has shape {bias.shape}; expected one that broadcasts to {(B, H, L, S)}")
    if softcap is not None and not softcap > 0:
        raise AttentionError(f"softcap is {softcap}; expected None or a positive number")
    if not 0.0 <= dropout < 1.0:
        raise AttentionError(f"dropout is {dropout}; expected a share of weights, 0 <= dropout < 1")
    if dropout > 0.0 and (dropout_key is None or dropout_key.shape != (2,) or dropout_key.dtype != mx.uint32):
        raise AttentionError("dropout needs dropout_key, a key of mx.random.key or mx.random.split: uint32 (2,)")


def _check_floating(name: str, given: mx.array | None) -> None:
    if given is not None and given.dtype not in _DTYPES:
        kind = str(given.dtype).removeprefix("mlx.core.")
        raise AttentionError(f"{name} is {kind}; expected float32, float16 or bfloat16")
