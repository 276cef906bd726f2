"""A decoding step of one row in few kernels: what `mlxlm.kernels.one_token` serves, put together for a whole model.

It serves decoders with RMSNorm before attention and before the feed-forward layer, maybe after them or on each head
too, with plain residual sums, rotary or no positions, in one dtype or quantized to 4 or 8 bits: LLaMA and what was made
after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn

from mlxlm import runtime
from mlxlm.kernels import one_token
from mlxlm.kernels.one_token import Heads, Norm, Weight
from mlxlm.kernels.one_token.selfcheck import disabled
from mlxlm.layers import Attention, Block, Cache, FeedForward, KeyValueCache, TokenPositions
from mlxlm.layers.cache_storage import FloatStorage
from mlxlm.layers.joined import JoinedLinear, form_of, parts_of
from mlxlm.layers.norms import OffsetRMSNorm, RMSNorm
from mlxlm.layers.positions import AttentionPositions, Rotary
from mlxlm.models import LanguageModelHeadSpec

if TYPE_CHECKING:
    from mlxlm.models import Transformer


class Unserved(Exception):
    """What of a model the kernels don't serve."""


def is_plain(cache: Cache) -> bool:
    """Whether a cache holds all tokens as plain arrays, and a prompt: what steps compiled as a whole need."""
    return all(
        type(layer) is KeyValueCache
        and type(layer.storage) is FloatStorage
        and layer.keys is not None
        and not layer.virtual
        for layer in cache
    )


class FusedLayers:
    """A decoder for one token of one row. Raises Unserved for a model that the kernels don't serve, or on the CPU."""

    def __init__(self, model: Transformer):
        if runtime.backend() == "cpu":
            raise Unserved("these are kernels for a GPU")
        if reason := disabled():
            raise Unserved(f"the kernels failed their check on this device: {reason}")
        if model.config.has_memory or model.prompt is not None or model.config.decoder.positions is not None:
            raise Unserved("the model has an encoder, virtual tokens, or positions that all layers share")
        self.model = model
        self.layers = [_FusedLayer(block) for block in model.decoder.layers]
        dtype = model.embeddings(mx.array([[0]]), TokenPositions(1)).dtype  # nothing of it is computed
        if any(layer.dtype != dtype for layer in self.layers):
            raise Unserved(f"embeddings are {dtype}, not all layers are")
        self.head = _head(model, dtype)
        # What was made of the weights here: a thread can't compute what another one has left uncomputed.
        norms = [norm for layer in self.layers for norm in (*layer.norms, *(layer.head_norms or ()))]
        mx.eval([norm.scale for norm in norms], [] if self.head is None else self.head[0].scale)

    def __call__(self, tokens: mx.array, place: mx.array, cache: Cache) -> mx.array:
        """Logits (1, V) after tokens (1,) at place () int32; the cache holds the new keys and values then."""
        model = self.model
        position = place.reshape(1)
        x = model.embeddings(tokens[:, None], TokenPositions(1, place)).reshape(-1)
        for layer, held in zip(self.layers, cache, strict=True):
            x = layer(x, position, held)
        if self.head is None:
            return model.logits(model.decoder.norm(x.reshape(1, 1, -1)))[:, -1]
        norm, table = self.head
        return one_token.product(x, table, norm=norm)[None]


class _FusedLayer:
    """One layer's weights, in the form of the kernels."""

    def __init__(self, block: nn.Module):
        if type(block) is not Block or block.spec.cross_attention is not None:
            raise Unserved(f"layers of the kind {type(block).__name__} are not served")
        attention, feed_forward = block.attention, block.feed_forward
        if type(attention) is not Attention or type(feed_forward) is not FeedForward:
            raise Unserved("there is an adapter around attention or around a feed-forward layer")
        spec, own = attention.spec, feed_forward.spec
        if spec.clip is not None or not spec.causal:
            raise Unserved("attention is not causal, or what it projects is clipped")
        if own.activation not in one_token.ACTIVATIONS:
            raise Unserved(f"the activation {own.activation} has no kernel")
        self.qkv = _joined(attention._joined, attention.query, attention.key, attention.value)
        if own.gated:
            self.up = _joined(feed_forward._joined, feed_forward.gate, feed_forward.up)
        else:
            self.up = _weight(feed_forward.up)
        self.output, self.down = _weight(attention.output), _weight(feed_forward.down)
        self.dtype = dtype = self.output.weight.dtype if self.output.scales is None else self.output.scales.dtype
        reasons = [weight.problem(dtype) for weight in (self.qkv, self.output, self.up, self.down)]
        for reason in (*reasons, one_token.serves(spec.head_dim, dtype)):
            if reason:
                raise Unserved(reason)
        residuals = block.attention_residual, block.feed_forward_residual
        self.norms = [_norm_in(residual, dtype) for residual in residuals]
        self.norms_out = [_norm_out(residual, dtype) for residual in residuals]
        self.heads, self.head_norms = _heads(attention), _head_norms(attention, dtype)
        self.scale, self.softcap, self.window = attention.scale, spec.softcap, spec.window
        self.kv_shape = (1, spec.num_kv_heads, 1, spec.head_dim)
        self.activation, self.gated = own.activation, own.gated

    def __call__(self, x: mx.array, position: mx.array, cache: KeyValueCache) -> mx.array:
        query, key, value = one_token.projected_heads(
            x, self.qkv, self.heads, position, norm=self.norms[0], head_norms=self.head_norms
        )
        keys, values, _ = cache.append(key.reshape(self.kv_shape), value.reshape(self.kv_shape), position)
        found = one_token.attend(
            query, keys[0], values[0], position, scale=self.scale, softcap=self.softcap, window=self.window
        )
        x = self._added(x, found, self.output, self.norms_out[0])
        hidden = one_token.product(x, self.up, norm=self.norms[1], activation=self.activation, gated=self.gated)
        return self._added(x, hidden, self.down, self.norms_out[1])

    @staticmethod
    def _added(x: mx.array, inner: mx.array, weight: Weight, norm_out: nn.Module | None) -> mx.array:
        if norm_out is None:
            return one_token.product(inner, weight, added=x)
        return x + norm_out(one_token.product(inner, weight))


def _is_identity(*layers: nn.Module) -> bool:
    return all(type(layer) is nn.Identity for layer in layers)


def _joined(joined: JoinedLinear | None, *layers: nn.Module) -> Weight:
    """The arrays of layers that were joined, and have the same weights still."""
    if joined is None or not joined.holds(*layers):
        raise Unserved("projections of one input are not joined")
    return _weight(joined)


def _weight(layer: Any) -> Weight:
    """The arrays of a joined or single linear layer, plain or quantized."""
    if isinstance(layer, JoinedLinear):
        parts, form = layer.parts, layer.form
    elif type(layer) in (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding):
        parts, form = parts_of(layer), form_of(layer)
    else:
        raise Unserved(f"a projection is a {type(layer).__name__}")
    if form.get("mode", "affine") != "affine":
        raise Unserved(f"weights quantized as {form['mode']} have no kernel")
    return Weight(**parts, bits=form.get("bits", 0), group_size=form.get("group_size", 0))


def _norm_in(residual: nn.Module, dtype: mx.Dtype) -> Norm:
    """The norm before a sublayer, where it is an RMSNorm and its input is added as it is."""
    plain = residual.spec.alpha == 1.0 and not residual.spec.from_normed and residual.after is None
    if not plain or not _is_identity(residual.norm_after):
        raise Unserved("there is a norm after the sum, or what is added is not the layer's input")
    return _rms_norm(residual.norm_in, dtype)


def _norm_out(residual: nn.Module, dtype: mx.Dtype) -> nn.Module | None:
    """The norm after a sublayer, any that leaves the dtype what it is."""
    norm = residual.norm_out
    if _is_identity(norm):
        return None
    if norm(mx.zeros((1, norm.weight.size), dtype=dtype)).dtype != dtype:  # nothing of it is computed
        raise Unserved("a norm is not in the dtype of the weights")
    return norm


def _rms_norm(norm: nn.Module, dtype: mx.Dtype) -> Norm:
    if type(norm) is OffsetRMSNorm:
        return Norm(scale=norm.weight.astype(mx.float32) + norm.spec.offset, eps=norm.spec.eps, rounded=False)
    if type(norm) is not RMSNorm or norm.weight.dtype != dtype:
        raise Unserved("a norm is not RMSNorm in the dtype of the weights")
    return Norm(scale=norm.weight.astype(mx.float32), eps=norm.eps)


def _head_norms(attention: nn.Module, dtype: mx.Dtype) -> tuple[Norm, Norm] | None:
    norms = attention.query_norm, attention.key_norm
    if _is_identity(*norms):
        return None
    of_query, of_key = (_rms_norm(norm, dtype) for norm in norms)
    width = attention.spec.head_dim
    alike = (of_query.eps, of_query.rounded) == (of_key.eps, of_key.rounded)
    if not alike or of_query.scale.size != width or of_key.scale.size != width:
        raise Unserved("queries and keys are not normed alike, head by head")
    return of_query, of_key


def _head(model: Transformer, dtype: mx.Dtype) -> tuple[Norm, Weight] | None:
    """The last norm and the table of the logits, where nothing else happens to them; else None."""
    spec = model.config.head
    if type(spec) is not LanguageModelHeadSpec or spec.transform is not None:
        return None
    if (spec.tied and spec.bias) or spec.scale != 1.0 or spec.softcap is not None:
        return None
    try:
        weight = _weight(model.embeddings.token if spec.tied else model.head.output)
        return None if weight.problem(dtype) else (_rms_norm(model.decoder.norm, dtype), weight)
    except Unserved:
        return None


def _heads(attention: nn.Module) -> Heads:
    spec, positions = attention.spec, attention.positions
    form = {"num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
    if type(positions) is AttentionPositions:
        return Heads(**form)
    if type(positions) is not Rotary or positions._inverse is None or positions._factor != 1.0:
        raise Unserved("the positions are not plain rotary ones")
    return Heads(**form, inverse=positions._inverse, interleaved=positions.spec.layout == "interleaved")
