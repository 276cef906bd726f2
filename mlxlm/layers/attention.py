"""Multi-head attention: projections around the one door `mlxlm.kernels.attention`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx import nn

from mlxlm.errors import ConfigError, UsageError
from mlxlm.kernels import AttentionMask, attention
from mlxlm.layers.alibi import AlibiSpec
from mlxlm.layers.cache import KeyValueCache
from mlxlm.layers.joined import FEW_TOKENS, JoinedLinear, applied
from mlxlm.layers.norms import NoNormSpec, NormSpec
from mlxlm.layers.positions import AttentionPositions, NoPositionsSpec, RotarySpec, TokenPositions
from mlxlm.layers.relative_positions import RelativeBucketsSpec
from mlxlm.layers.rotary_2d import Rotary2dSpec
from mlxlm.layers.spec import Spec
from mlxlm.layers.virtual import Prefix, attend_in_segments, before, shifted


@dataclass
class Scope:
    """What one forward pass knows of its tokens: where they stand and which of them belong together.

    positions: of the tokens of this pass.  mask: padding, segments and prefixes; each layer adds its own direction
    and window.  memory_mask: the same for an encoder's output, seen by cross-attention.
    shared: a position encoding that all self-attention layers of a stack have in common.
    prefix: keys and values that stand before those of the tokens, in the layer that comes next.
    virtual: how many of the tokens at the start of each row are virtual ones, which all documents of a row see.
    slots: () or (B,), where a cache writes the first of these tokens; None for behind those it holds.
    """

    positions: TokenPositions
    mask: AttentionMask = field(default_factory=AttentionMask)
    memory_mask: AttentionMask = field(default_factory=AttentionMask)
    shared: AttentionPositions | None = None
    prefix: Prefix | None = None
    virtual: int = 0
    slots: mx.array | None = None
    _masks: dict[tuple[bool, int | None, int], AttentionMask] = field(default_factory=dict)
    _terms: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)

    def mask_for(self, causal: bool, window: int | None, before: int = 0) -> AttentionMask:
        """The mask of a layer; made once a pass, since most layers share it.  before: keys ahead of the tokens'."""
        key = (causal, window, before)
        if key not in self._masks:
            placed = {} if self.slots is None else {"query_offset": self.slots, "at_keys": True}
            self._masks[key] = replace(shifted(self.mask, before), causal=causal, window=window, **placed)
        return self._masks[key]

    def shared_terms(self, query_length: int, key_length: int, dropped: int = 0) -> dict[str, Any]:
        """What the shared position encoding adds to the scores; made once a pass, since its layers all need it.

        dropped: tokens before the first of the keys.
        """
        if self.shared is None:
            return {}
        key = (query_length, key_length, dropped)
        if key not in self._terms:
            self._terms[key] = self.shared.score_terms(query_length, key_length, self.positions.offset - dropped)
        return self._terms[key]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(Spec):
    """Scaled dot-product attention with several heads (Vaswani et al. 2017, arXiv:1706.03762).

    dim: features in and out.  num_heads: query heads.  num_kv_heads: key/value heads, a divisor of num_heads: equal is
    multi-head, 1 multi-query (Shazeer 2019, arXiv:1911.02150), else grouped (Ainslie et al. 2023, arXiv:2305.13245).
    head_dim: features of a head.  causal: a query sees no later key.  window: a causal query sees that many keys, its
    own included, default all.  positions: hooks on queries, keys and scores.  bias: on query, key and value,
    output_bias: on the output projection, default False.  query_norm, key_norm: over each head, before positions.
    scale: of the scores, default head_dim ** -0.5.  softcap: bounds scores by softcap * tanh(score / softcap).
    clip: bounds projected queries, keys and values to [-clip, clip], default none.
    dropout: of attention probabilities in training, default 0.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    positions: NoPositionsSpec | RotarySpec | Rotary2dSpec | AlibiSpec | RelativeBucketsSpec = NoPositionsSpec()
    bias: bool = False
    output_bias: bool = False
    query_norm: NormSpec = NoNormSpec()
    key_norm: NormSpec = NoNormSpec()
    scale: float | None = None
    softcap: float | None = None
    clip: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} query heads can't share {self.num_kv_heads} key/value heads evenly")

    def build(self) -> Attention:
        """The module, (B, L, dim) -> (B, L, dim)."""
        return Attention(self)


class Attention(nn.Module):
    """See `AttentionSpec`. Weights: query, key, value, output, and query_norm, key_norm where they are asked for."""

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        self.spec = spec
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        self.query = nn.Linear(spec.dim, spec.num_heads * spec.head_dim, bias=spec.bias)
        self.key = nn.Linear(spec.dim, spec.num_kv_heads * spec.head_dim, bias=spec.bias)
        self.value = nn.Linear(spec.dim, spec.num_kv_heads * spec.head_dim, bias=spec.bias)
        self.output = nn.Linear(spec.num_heads * spec.head_dim, spec.dim, bias=spec.output_bias)
        self.positions = spec.positions.build()
        self.query_norm = spec.query_norm.build()
        self.key_norm = spec.key_norm.build()
        # The three projections of self-attention as one, where `join` made one. No parameter to mlx.nn.
        self._joined: JoinedLinear | None = None

    def __call__(
        self, x: mx.array, scope: Scope, cache: KeyValueCache | None = None, memory: mx.array | None = None
    ) -> mx.array:
        """x (B, L, dim) attends to itself and the cache, or to memory (B, S, dim) when that is given."""
        if memory is not None:
            return self.project_out(self._attend_to_memory(x, scope, cache, memory))
        return self.project_out(self.attend(*self.project(x, scope), scope, cache))

    def project(self, x: mx.array, scope: Scope) -> tuple[mx.array, mx.array, mx.array]:
        """Queries (B, H, L, D), keys and values (B, Hkv, L, D) of x (B, L, dim), turned by their positions."""
        if self._joined is not None:
            if self.training or not self._joined.holds(self.query, self.key, self.value):
                self._joined = None  # other weights are there, or will be
            elif x.shape[1] <= FEW_TOKENS:
                return self._project_joined(self._joined(x), scope)
        key, value = self._keys_and_values(x)
        query = self.query_norm(self._heads(applied(self.query, x)))
        return *self.positions.rotate(query, key, scope.positions), value

    def _project_joined(self, x: mx.array, scope: Scope) -> tuple[mx.array, mx.array, mx.array]:
        """See `project`: x (B, L, all heads) are queries, keys and values side by side."""
        heads = self._heads(x)
        first, last = self.spec.num_heads, self.spec.num_heads + self.spec.num_kv_heads
        value = heads[:, last:]
        if isinstance(self.spec.query_norm, NoNormSpec) and isinstance(self.spec.key_norm, NoNormSpec):
            both = self.positions.turn(heads[:, :last], scope.positions)
            return both[:, :first], both[:, first:], value
        query, key = self.query_norm(heads[:, :first]), self.key_norm(heads[:, first:last])
        return *self.positions.rotate(query, key, scope.positions), value

    def join(self) -> None:
        """Compute the projections of self-attention as one where that is possible; for inference, see `joined`."""
        layers = (self.query, self.key, self.value)
        if self._joined is None or not self._joined.holds(*layers):
            self._joined = JoinedLinear(layers) if JoinedLinear.joins(layers) else None

    def attend(
        self, query: mx.array, key: mx.array, value: mx.array, scope: Scope, cache: KeyValueCache | None = None
    ) -> mx.array:
        """What the queries find in these keys and values and those of the cache, (B, H, L, D)."""
        own, prefix = self.spec, scope.prefix
        options: dict[str, Any] = {"scale": self.scale, "softcap": own.softcap, **self._dropout()}
        count = 0
        if prefix is not None and prefix.key is not None:
            if cache is None:
                key, value = before(prefix.key, key), before(prefix.value, value)
                count = prefix.key.shape[2]
            else:
                cache.begin(before(prefix.key, key[:, :, :0]), before(prefix.value, value[:, :, :0]))
                count = cache.virtual
        if scope.mask.query_segments is not None and (count or scope.virtual):
            return self._in_segments(query, key, value, count, scope)
        mask = scope.mask_for(own.causal, own.window, count)
        if cache is None:
            return attention(query, key, value, mask=mask, **self._terms(scope, query, key), **options)

        def terms(query_length: int, key_length: int, dropped: int) -> dict[str, Any]:
            shared = scope.shared_terms(query_length, key_length, dropped)
            return shared | self.positions.score_terms(query_length, key_length, scope.positions.offset - dropped)

        return cache.attend(query, key, value, mask=mask, at=scope.slots, terms=terms, **options)

    def _terms(self, scope: Scope, query: mx.array, key: mx.array) -> dict[str, Any]:
        lengths = query.shape[2], key.shape[2]
        return scope.shared_terms(*lengths) | self.positions.score_terms(*lengths, scope.positions.offset)

    def _dropout(self) -> dict[str, Any]:
        if not (self.training and self.spec.dropout > 0):
            return {}
        # Drawn from MLX's global random state, so that compiled training steps that capture it stay reproducible.
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        return {"dropout": self.spec.dropout, "dropout_key": key}

    def _attend_to_memory(self, x: mx.array, scope: Scope, cache: KeyValueCache | None, memory: mx.array) -> mx.array:
        query = self.query_norm(self._heads(applied(self.query, x)))
        key, value = self._projected_memory(memory, cache)
        mask = scope.memory_mask
        if scope.prefix is not None and scope.prefix.memory_key is not None:
            key, value = before(scope.prefix.memory_key, key), before(scope.prefix.memory_value, value)
            mask = shifted(mask, scope.prefix.memory_key.shape[2])
        return attention(query, key, value, scale=self.scale, mask=mask, softcap=self.spec.softcap, **self._dropout())

    def project_out(self, out: mx.array) -> mx.array:
        """The layer's output (B, L, dim) of what was found, (B, H, L, D)."""
        batch, _, length, _ = out.shape
        return applied(self.output, out.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def _in_segments(self, query: mx.array, key: mx.array, value: mx.array, count: int, scope: Scope) -> mx.array:
        """Packed rows with keys that belong to every document: the `count` of a prefix, or those of virtual tokens."""
        if scope.shared is not None or isinstance(self.spec.positions, (AlibiSpec, RelativeBucketsSpec)):
            raise UsageError(
                "virtual tokens before packed documents need positions that are counted in each document; the scores "
                "of this model depend on places in the row: give one document a row"
            )
        if self.training and self.spec.dropout > 0:
            raise UsageError("packed documents with virtual tokens go with no attention dropout; give one a row")
        options = {"scale": self.scale, "softcap": self.spec.softcap}
        own = AttentionMask(causal=self.spec.causal, window=self.spec.window)
        if count:
            mask = scope.mask_for(self.spec.causal, self.spec.window)
            places = scope.positions.array()
            return attend_in_segments(query, key, value, count=count, positions=places, mask=mask, **options)
        v = scope.virtual
        if not self.spec.causal:
            raise UsageError("virtual tokens of an encoder would mix packed documents; give one document a row")
        first = attention(query[:, :, :v], key[:, :, :v], value[:, :, :v], mask=own, **options)
        places = scope.positions.array()[:, v:]
        mask = scope.mask_for(self.spec.causal, self.spec.window)
        rest = attend_in_segments(query[:, :, v:], key, value, count=v, positions=places, mask=mask, **options)
        return mx.concatenate([first, rest], axis=2)

    def _heads(self, x: mx.array) -> mx.array:
        if self.spec.clip is not None:
            x = mx.clip(x, -self.spec.clip, self.spec.clip)
        batch, length, _ = x.shape
        return x.reshape(batch, length, -1, self.spec.head_dim).transpose(0, 2, 1, 3)

    def _keys_and_values(self, x: mx.array) -> tuple[mx.array, mx.array]:
        key = self.key_norm(self._heads(applied(self.key, x)))
        return key, self._heads(applied(self.value, x))

    def _projected_memory(self, memory: mx.array, cache: KeyValueCache | None) -> tuple[mx.array, mx.array]:
        if cache is None:
            return self._keys_and_values(memory)
        if cache.memory is None:
            cache.memory = self._keys_and_values(memory)
        return cache.memory
