"""How a cache holds keys and values: as they are, or quantized; and attention on what is held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxlm.errors import UsageError, listing
from mlxlm.kernels import AttentionMask, attention

# The arrays that stand for the keys (or values) of a layer, each (B, Hkv, L, ...).
Parts = tuple[mx.array, ...]
# Query length, key length, keys that were dropped before the first -> keywords for `attention` that add to the scores.
Terms = Callable[[int, int, int], dict[str, Any]]


@dataclass(frozen=True)
class FloatStorage:
    """Keys and values as they are."""

    def pack(self, x: mx.array) -> Parts:
        """The arrays that stand for keys or values (B, Hkv, L, D)."""
        return (x,)

    def unpack(self, parts: Parts, dtype: mx.Dtype, dim: int) -> mx.array:
        """The way back, (B, Hkv, L, dim)."""
        return parts[0]

    def attend(
        self, query: mx.array, keys: Parts, values: Parts, *, mask: AttentionMask, dim: int, **options: Any
    ) -> mx.array:
        """Attention of query (B, H, L, D), (B, H, L, dim). options: further keywords of `attention`."""
        return attention(query, keys[0], values[0], mask=mask, **options)


@dataclass(frozen=True)
class QuantizedStorage:
    """Keys and values of 8 or 4 bits in groups of features, each group with a scale and a bias (`mx.quantize`).

    Heads whose width is no multiple of the group are padded with zeros. A few queries meet the packed arrays
    themselves (`mx.quantized_matmul`); more of them meet tiles of `tile` keys that are unpacked one after another and
    joined by their normalisers, so no unpacked copy of the whole ever exists.
    """

    bits: int
    group_size: int = 64
    tile: int = 2048

    def __post_init__(self) -> None:
        for name, value, valid in (("bits", self.bits, (4, 8)), ("group_size", self.group_size, (32, 64, 128))):
            if value not in valid:
                raise UsageError(f"a quantized cache can't have {name} {value}; valid: {listing(map(str, valid))}")

    def pack(self, x: mx.array) -> Parts:
        """See `FloatStorage.pack`: packed integers, scales, biases."""
        return tuple(mx.quantize(self._padded(x), group_size=self.group_size, bits=self.bits))

    def unpack(self, parts: Parts, dtype: mx.Dtype, dim: int) -> mx.array:
        """See `FloatStorage.unpack`."""
        return mx.dequantize(*parts, group_size=self.group_size, bits=self.bits).astype(dtype)[..., :dim]

    def attend(
        self, query: mx.array, keys: Parts, values: Parts, *, mask: AttentionMask, dim: int, **options: Any
    ) -> mx.array:
        """See `FloatStorage.attend`."""
        if options.pop("dropout", 0.0):
            raise UsageError("attention dropout goes with no quantized cache")
        options.pop("dropout_key", None)
        if query.shape[2] <= 8:
            return self._on_packed(query, keys, values, mask=mask, dim=dim, **options)
        return self._on_tiles(query, keys, values, mask=mask, dim=dim, **options)

    def _padded(self, x: mx.array) -> mx.array:
        missing = -x.shape[-1] % self.group_size
        return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x

    def _on_packed(
        self,
        query: mx.array,
        keys: Parts,
        values: Parts,
        *,
        mask: AttentionMask,
        dim: int,
        scale: float,
        softcap: float | None = None,
        alibi_slopes: mx.array | None = None,
        relative_bias: mx.array | None = None,
        bias: mx.array | None = None,
    ) -> mx.array:
        """The formula of `attention`, with the scores of these few queries as a whole."""
        batch, heads, length, _ = query.shape
        kv_heads, key_length = keys[0].shape[1:3]
        form = {"group_size": self.group_size, "bits": self.bits}
        grouped = self._padded(query * scale).reshape(batch, kv_heads, -1, keys[1].shape[-1] * self.group_size)
        score = mx.quantized_matmul(grouped, *keys, transpose=True, **form)
        score = score.astype(mx.float32).reshape(batch, heads, length, key_length)
        if softcap is not None:
            score = softcap * mx.tanh(score / softcap)
        if alibi_slopes is not None:
            places = mask.query_positions(length, key_length)[:, None, :, None]
            score = score - alibi_slopes[:, None, None] * mx.abs(places - mx.arange(key_length))
        if relative_bias is not None:
            diagonal = mx.arange(key_length) - mx.arange(length)[:, None] + (length - 1)
            score = score + relative_bias[:, diagonal]
        if bias is not None:
            score = score + bias
        visible = mask.dense(batch, length, key_length)
        if visible is not None:
            score = mx.where(visible, score, -mx.inf)
        # Each of these queries sees at least its own key, so no row is empty.
        weights = mx.softmax(score, axis=-1).astype(query.dtype).reshape(batch, kv_heads, -1, key_length)
        out = mx.quantized_matmul(weights, *values, transpose=False, **form)
        return out.reshape(batch, heads, length, -1)[..., :dim]

    def _on_tiles(
        self,
        query: mx.array,
        keys: Parts,
        values: Parts,
        *,
        mask: AttentionMask,
        dim: int,
        relative_bias: mx.array | None = None,
        bias: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        length, key_length = query.shape[2], keys[0].shape[2]
        offset = mask.offset(length, key_length)
        total, out = None, None
        for start in range(0, key_length, self.tile):
            part = slice(start, min(start + self.tile, key_length))
            given = dict(options)
            if relative_bias is not None:
                given["relative_bias"] = relative_bias[:, part.start : part.stop + length - 1]
            if bias is not None:
                given["bias"] = bias[..., part] if bias.shape[-1] > 1 else bias
            prefix = None if mask.prefix_lengths is None else mx.maximum(mask.prefix_lengths - start, 0)
            here = replace(mask, query_offset=offset - start, prefix_lengths=prefix)
            tile = [
                self.unpack(tuple(array[:, :, part] for array in parts), query.dtype, width)
                for parts, width in ((keys, query.shape[-1]), (values, dim))
            ]
            found, lse = attention(query, *tile, mask=here, return_lse=True, **given)
            found, lse = found.astype(mx.float32), mx.where(lse == mx.inf, -mx.inf, lse)
            if out is None:
                total, out = lse, found
                continue
            joint = mx.logaddexp(total, lse)
            # A query that saw nothing so far has -inf in both: it stays at 0.
            known = mx.where(joint == -mx.inf, 0.0, joint)
            out = mx.exp(total - known)[..., None] * out + mx.exp(lse - known)[..., None] * found
            total = joint
            mx.async_eval(out, total)
        return out.astype(query.dtype)


Storage = FloatStorage | QuantizedStorage
