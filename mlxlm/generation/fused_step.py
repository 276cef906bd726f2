"""A decoding step of one row in few kernels: what `mlxlm.kernels.one_token` serves, put together for a whole model.

It serves decoders whose layers are RMSNorm before attention and before the feed-forward layer, with residual sums,
rotary or no positions, in one dtype or quantized to 4 or 8 bits: LLaMA and what was made after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn

from mlxlm import runtime
from mlxlm.kernels import one_token
from mlxlm.kernels.one_token import Heads, Norm, Weight
from mlxlm.layers import Block, Cache, KeyValueCache, TokenPositions
from mlxlm.layers.cache_storage import FloatStorage
from mlxlm.layers.joined import JoinedLinear
from mlxlm.layers.norms import OffsetRMSNorm
from mlxlm.layers.positions import AttentionPositions, Rotary

if TYPE_CHECKING:
    from mlxlm.models import Transformer


class Unserved(Exception):
    """What of a model the kernels don't serve."""


def fits(cache: Cache, rows: int) -> bool:
    """Whether a step over the cache can be a fused one: one row, all tokens kept, as plain arrays."""
    return rows == 1 and all(
        type(layer) is KeyValueCache and type(layer.storage) is FloatStorage and layer.keys is not None
        and not layer.virtual for layer in cache
    )  # fmt: skip


class FusedLayers:
    """A decoder for one token of one row. Raises Unserved for a model that the kernels don't serve, or on the CPU."""

    def __init__(self, model: Transformer):
        if runtime.backend() == "cpu":
            raise Unserved("these are kernels for a GPU")
        if model.config.has_memory or model.prompt is not None or model.config.decoder.positions is not None:
            raise Unserved("the model has an encoder, virtual tokens, or positions that all layers share")
        self.model = model
        self.layers = [_FusedLayer(block) for block in model.decoder.layers]
        dtype = model.embeddings(mx.array([[0]]), TokenPositions(1)).dtype  # nothing of it is computed
        if any(layer.dtype != dtype for layer in self.layers):
            raise Unserved(f"embeddings are {dtype}, not all layers are")

    def __call__(self, tokens: mx.array, place: mx.array, cache: Cache) -> mx.array:
        """Logits (1, V) after tokens (1,) at place () int32; the cache holds the new keys and values then."""
        model = self.model
        position = place.reshape(1)
        x = model.embeddings(tokens[:, None], TokenPositions(1, place)).reshape(-1)
        for layer, held in zip(self.layers, cache, strict=True):
            x = layer(x, position, held)
        return model.logits(model.decoder.norm(x.reshape(1, 1, -1)))[:, -1]


class _FusedLayer:
    """One layer's weights, in the form of the kernels."""

    def __init__(self, block: nn.Module):
        if type(block) is not Block or block.spec.cross_attention is not None:
            raise Unserved(f"layers of the kind {type(block).__name__} are not served")
        attention, feed_forward = block.attention, block.feed_forward
        spec = attention.spec
        if spec.clip is not None or not _is_identity(attention.query_norm, attention.key_norm):
            raise Unserved("projected queries and keys are clipped or normed")
        if not spec.causal:
            raise Unserved("attention is not causal")
        if attention._joined is None:
            raise Unserved("the projections of attention can't be joined")
        self.qkv, self.output = _weight(attention._joined), _weight(attention.output)
        self.dtype = dtype = self.output.weight.dtype if self.output.scales is None else self.output.scales.dtype
        self.norms = _norm(block.attention_residual, dtype), _norm(block.feed_forward_residual, dtype)
        self.heads = _heads(attention)
        self.scale, self.softcap, self.window = attention.scale, spec.softcap, spec.window
        self.kv_shape = (1, spec.num_kv_heads, 1, spec.head_dim)
        own = feed_forward.spec
        if own.activation not in one_token.ACTIVATIONS:
            raise Unserved(f"the activation {own.activation} has no kernel")
        if own.gated and feed_forward._joined is None:
            raise Unserved("the projections of the feed-forward layer can't be joined")
        self.activation, self.gated = own.activation, own.gated
        self.up = _weight(feed_forward._joined if own.gated else feed_forward.up)
        self.down = _weight(feed_forward.down)
        reasons = [w.problem(dtype) for w in (self.qkv, self.output, self.up, self.down)]
        for reason in (*reasons, one_token.serves(spec.head_dim, dtype)):
            if reason:
                raise Unserved(reason)

    def __call__(self, x: mx.array, position: mx.array, cache: KeyValueCache) -> mx.array:
        query, key, value = one_token.projected_heads(x, self.qkv, self.heads, position, norm=self.norms[0])
        keys, values, _ = cache.append(key.reshape(self.kv_shape), value.reshape(self.kv_shape), position)
        found = one_token.attend(
            query, keys[0], values[0], position, scale=self.scale, softcap=self.softcap, window=self.window
        )
        x = one_token.product(found, self.output, added=x)
        hidden = one_token.product(x, self.up, norm=self.norms[1], activation=self.activation, gated=self.gated)
        return one_token.product(hidden, self.down, added=x)


def _is_identity(*layers: nn.Module) -> bool:
    return all(type(layer) is nn.Identity for layer in layers)


def _weight(layer: Any) -> Weight:
    """The arrays of a joined or single linear layer, plain or quantized."""
    if isinstance(layer, JoinedLinear):
        parts, form = layer.parts, layer._form
    elif type(layer) in (nn.Linear, nn.QuantizedLinear):
        parts = {name: layer[name] for name in ("weight", "scales", "biases", "bias") if name in layer}
        form = {name: getattr(layer, name) for name in ("group_size", "bits", "mode") if hasattr(layer, name)}
    else:
        raise Unserved(f"a projection is a {type(layer).__name__}")
    if form.get("mode", "affine") != "affine":
        raise Unserved(f"weights quantized as {form['mode']} have no kernel")
    return Weight(**parts, bits=form.get("bits", 0), group_size=form.get("group_size", 0))


def _norm(residual: nn.Module, dtype: mx.Dtype) -> Norm:
    """The norm before a sublayer, where it is an RMSNorm and there is no other."""
    plain = residual.spec.alpha == 1.0 and not residual.spec.from_normed and residual.after is None
    if not plain or not _is_identity(residual.norm_out, residual.norm_after):
        raise Unserved("norms stand elsewhere than before a sublayer, or its input is scaled")
    norm = residual.norm_in
    if type(norm) is OffsetRMSNorm:
        return Norm(scale=norm.weight.astype(mx.float32) + norm.spec.offset, eps=norm.spec.eps, rounded=False)
    if type(norm) is not nn.RMSNorm or norm.weight.dtype != dtype:
        raise Unserved("the norms are not RMSNorm in the dtype of the weights")
    return Norm(scale=norm.weight.astype(mx.float32), eps=norm.eps)


def _heads(attention: nn.Module) -> Heads:
    spec, positions = attention.spec, attention.positions
    form = {"num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
    if type(positions) is AttentionPositions:
        return Heads(**form)
    if type(positions) is not Rotary or positions._inverse is None or positions._factor != 1.0:
        raise Unserved("the positions are not plain rotary ones")
    return Heads(**form, inverse=positions._inverse, interleaved=positions.spec.layout == "interleaved")
