"""MLX's own attention, mx.fast.scaled_dot_product_attention, for what it can do exactly.

It knows no soft-cap, no dropout and no log-sum-exp, adds masks in the dtype of the query, and gives the mean of the
values to a query that sees no key. The last is mended here: such a row is shown all keys, then set to zero, which
also makes its gradients zero and keeps NaN out on every backend.

On GPUs it has no gradient for sinks, on CUDA none for additive masks either, and raises when asked (MLX 0.32). So with
those its gradient is that of the tiled path, which computes the forward pass again in linear memory.
"""

from __future__ import annotations

import mlx.core as mx

from mlxlm.kernels.attention import tiled
from mlxlm.kernels.attention.mask import AttentionMask

Arrays = dict[str, mx.array]


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    *,
    scale: float,
    mask: AttentionMask,
    alibi_slopes: mx.array | None = None,
    relative_bias: mx.array | None = None,
    bias: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    dropout: float = 0.0,
    dropout_key: mx.array | None = None,
    return_lse: bool = False,
) -> mx.array:
    """Attention by MLX; same arguments as the reference, of which `refusal` says what is not served."""
    given = {"alibi_slopes": alibi_slopes, "relative_bias": relative_bias, "bias": bias, "sinks": sinks}
    inputs = {"query": query, "key": key, "value": value} | {
        n: array for n, array in given.items() if array is not None
    }
    if len(inputs) == 3:
        return _forward(inputs, scale, mask)

    @mx.custom_function
    def run(inputs: Arrays) -> mx.array:
        return _forward(inputs, scale, mask)

    @run.vjp
    def run_vjp(inputs: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        names = list(inputs)

        def again(*arrays: mx.array) -> mx.array:
            return tiled.attention(**dict(zip(names, arrays, strict=True)), scale=scale, mask=mask)

        _, gradients = mx.vjp(again, list(inputs.values()), [cotangent])
        return dict(zip(names, gradients, strict=True))

    return run(inputs)


def _forward(inputs: Arrays, scale: float, mask: AttentionMask) -> mx.array:
    """The call of mx.fast, with everything that hides or shifts scores in one array."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    bias, sinks = inputs.get("bias"), inputs.get("sinks")
    batch, _, query_length, _ = query.shape
    key_length = key.shape[2]
    if sinks is not None:
        sinks = sinks.astype(query.dtype)
    additive = _additive_terms(query, key, mask, inputs.get("alibi_slopes"), inputs.get("relative_bias"), bias)
    if additive is None:
        if mask.is_plain(query_length, key_length):
            return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, sinks=sinks)
        if query_length <= key_length and mask.is_causal_lower_right(query_length, key_length):
            return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask="causal", sinks=sinks)

    visible = mask.dense(batch, query_length, key_length)
    empty = None
    if visible is not None and mask.may_have_empty_rows(query_length, key_length):
        empty = ~visible.any(axis=-1, keepdims=True)
        visible = visible | empty
    array = visible
    if additive is not None:
        array = additive if visible is None else mx.where(visible, additive, mx.array(-mx.inf, dtype=query.dtype))
        if bias is not None and sinks is None:
            # A bias of -inf hides keys too, and may hide all of them.
            hidden = mx.max(array, axis=-1, keepdims=True) == -mx.inf
            array = mx.where(hidden, mx.array(0, dtype=array.dtype), array)
            empty = hidden if empty is None else empty | hidden
    # The mask of a checkpointed layer counts as one of its inputs: CUDA would be asked for its gradient, and raise.
    out = mx.fast.scaled_dot_product_attention(
        query, key, value, scale=scale, mask=mx.stop_gradient(array), sinks=sinks
    )
    return out if empty is None else mx.where(empty, mx.array(0, dtype=query.dtype), out)


def refusal(
    dtype: mx.Dtype,
    *,
    alibi_slopes: mx.array | None = None,
    relative_bias: mx.array | None = None,
    bias: mx.array | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> str | None:
    """Why MLX's attention can't serve these arguments exactly, or None when it can."""
    if softcap is not None:
        return "mx.fast has no soft-cap"
    if dropout > 0.0:
        return "mx.fast has no dropout"
    if return_lse:
        return "mx.fast does not return the log-sum-exp"
    if dtype != mx.float32:
        if alibi_slopes is not None or relative_bias is not None:
            return "mx.fast would round ALiBi and relative biases to 16 bits"
        if bias is not None and bias.dtype != dtype:
            return f"mx.fast would round the bias to {str(dtype).removeprefix('mlx.core.')}"
    return None


def _additive_terms(
    query: mx.array,
    key: mx.array,
    mask: AttentionMask,
    alibi_slopes: mx.array | None,
    relative_bias: mx.array | None,
    bias: mx.array | None,
) -> mx.array | None:
    """What is added to the scores, dense and in the dtype of the query: broadcastable to (B, H, Lq, Lk), or None."""
    L, S = query.shape[2], key.shape[2]
    terms = []
    if alibi_slopes is not None:
        distance = mx.abs(mask.query_positions(L, S)[:, None, :, None] - mx.arange(S))
        terms.append(-alibi_slopes.astype(query.dtype)[:, None, None] * distance.astype(query.dtype))
    if relative_bias is not None:
        diagonal = mx.arange(S) - mx.arange(L)[:, None] + (L - 1)
        terms.append(relative_bias.astype(query.dtype)[None, :, diagonal])
    if bias is not None:
        terms.append(bias.astype(query.dtype))
    return sum(terms[1:], terms[0]) if terms else None
