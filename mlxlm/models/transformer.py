"""The one Transformer: encoder, decoder, or both, as its configuration says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn

from mlxlm.errors import PromptError, UnsupportedModelError, UsageError
from mlxlm.kernels import AttentionMask
from mlxlm.layers import Cache, Scope, TokenPositions
from mlxlm.models.config import StackSpec, TransformerConfig


class Stack(nn.Module):
    """Blocks one after another, then a norm. See `StackSpec`."""

    def __init__(self, spec: StackSpec):
        super().__init__()
        self.spec = spec
        self.layers = [layer.build() for layer in spec.layers]
        self.norm = spec.norm.build()
        self.dropout = nn.Dropout(spec.dropout)
        if spec.positions is not None:
            self.positions = spec.positions.build()
        # How many of the first layers are computed again for their gradients instead of kept. No parameter to mlx.nn.
        self._recomputed = 0

    def __call__(
        self, x: mx.array, scope: Scope, cache: Cache | None = None, memory: mx.array | None = None
    ) -> mx.array:
        """x (B, L, dim) -> (B, L, dim).  memory (B, S, dim): an encoder's output, for cross-attention."""
        if self.spec.positions is not None:
            scope.shared = self.positions
        x = self.dropout(x)
        for index, layer in enumerate(self.layers):
            if index < self._recomputed and cache is None:
                x = self._recompute(layer, x, scope, memory)
            else:
                x = layer(x, scope, None if cache is None else cache[index], memory)
        return self.dropout(self.norm(x))

    def _recompute(self, layer: nn.Module, x: mx.array, scope: Scope, memory: mx.array | None) -> mx.array:
        """The layer's output, of which nothing but the inputs is kept for the gradients (Chen et al. 2016,
        arXiv:1604.06174). All that gradients flow to must be an argument: what is merely captured would get none.
        """
        shared = self.positions if self.spec.positions is not None else None

        def run(
            own: dict[str, Any], common: dict[str, Any], x: mx.array, memory: mx.array | None, key: mx.array
        ) -> mx.array:
            layer.update(own)
            if shared is not None:
                shared.update(common)
            state = mx.random.state[0]
            before, state[:] = mx.array(state), mx.stop_gradient(key)  # the same dropout in both computations
            y = layer(x, replace(scope, _terms={}), None, memory)
            state[:] = before
            return y

        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        common = {} if shared is None else shared.trainable_parameters()
        own = layer.trainable_parameters()
        y = mx.checkpoint(run)(own, common, x, memory, key)
        # While its graph is made, the layer holds the arrays of that graph; outside it has its own.
        layer.update(own)
        if shared is not None:
            shared.update(common)
        return y


class Transformer(nn.Module):
    """A Transformer model (Vaswani et al. 2017, arXiv:1706.03762), built from a `TransformerConfig`.

    Shapes: B rows, L tokens, S tokens of an encoder, V words of the vocabulary. Token ids are integers. Keywords:

    key_lengths (B,): valid tokens of each row, the rest is padding on the right (of the encoder's tokens where there
    is an encoder).  prefix_lengths (B,): tokens that all see, in a decoder (prefix LM).  token_types (B, L).
    positions (B, L): instead of 0, 1, 2 ...  blocks (B, L): a second coordinate, for models whose positions have two.
    segments (B, L): tokens see only those of equal id (packed documents).
    vectors (B, L, dim): instead of the tokens' embeddings.  cache: from `make_cache`; the tokens continue it.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embeddings = config.embeddings.build()
        if config.encoder is not None:
            self.encoder = Stack(config.encoder)
        if config.decoder is not None:
            self.decoder = Stack(config.decoder)
        if config.head is not None:
            self.head = config.head.build()
        if config.pooler is not None:
            self.pooler = config.pooler.build()

    def __call__(self, tokens: mx.array, **keywords: object) -> mx.array:
        """Logits of tokens (B, L), or of decoder_tokens where there is an encoder and a decoder.

        (B, L, V); with a classification head (B, L, labels) for tokens and spans, (B, labels) for sequences.
        """
        return self.logits(self.hidden(tokens, **keywords), keywords.get("key_lengths"))  # type: ignore[arg-type]

    def hidden(
        self,
        tokens: mx.array,
        *,
        decoder_tokens: mx.array | None = None,
        key_lengths: mx.array | None = None,
        prefix_lengths: mx.array | None = None,
        token_types: mx.array | None = None,
        positions: mx.array | None = None,
        blocks: mx.array | None = None,
        segments: mx.array | None = None,
        vectors: mx.array | None = None,
        memory: mx.array | None = None,
        cache: Cache | None = None,
        context: int = 0,
    ) -> mx.array:
        """Last hidden states (B, L, dim), after the final norm.

        With encoder and decoder: `tokens` go to the encoder, `decoder_tokens` to the decoder; `memory` (B, S, dim),
        from `encode`, saves encoding the same tokens again.  context: tokens of the whole prompt, when these are a
        chunk of it; positions that depend on the length of the context are then those of the whole.
        """
        self._check(tokens, segments, cache)
        if blocks is not None and not self.config.fills_blanks:
            raise UsageError("blocks are for models whose positions have two coordinates; those of this one have one")
        if self.config.has_memory:
            if decoder_tokens is None:
                raise UsageError("an encoder-decoder model needs decoder_tokens")
            if positions is not None or prefix_lengths is not None:
                raise UsageError("positions and prefix_lengths are for models with a single stack")
            if memory is None:
                memory = self.encode(
                    tokens, key_lengths=key_lengths, token_types=token_types, segments=segments, vectors=vectors
                )
            return self.decode(decoder_tokens, memory, memory_lengths=key_lengths, cache=cache)
        if decoder_tokens is not None:
            raise UsageError("decoder_tokens are for encoder-decoder models; this one has a single stack")
        self._check_single(token_types, key_lengths, prefix_lengths, memory, cache)
        mask = AttentionMask(
            key_lengths=key_lengths, prefix_lengths=prefix_lengths, query_segments=segments, key_segments=segments
        )
        scope = Scope(self._positions(tokens, positions, cache, blocks, context), mask)
        x = self.embeddings(tokens, scope.positions, token_types, vectors)
        return self.decoder(x, scope, cache) if self.config.encoder is None else self.encoder(x, scope)

    def encode(
        self,
        tokens: mx.array,
        *,
        key_lengths: mx.array | None = None,
        token_types: mx.array | None = None,
        segments: mx.array | None = None,
        vectors: mx.array | None = None,
    ) -> mx.array:
        """The encoder's output (B, S, dim): the memory of an encoder-decoder model.

        Raises UnsupportedModelError for a model without an encoder.
        """
        if self.config.encoder is None:
            raise UnsupportedModelError("this model has no encoder; model.hidden() gives its hidden states")
        self._check(tokens, segments, None)
        mask = AttentionMask(key_lengths=key_lengths, query_segments=segments, key_segments=segments)
        scope = Scope(self._positions(tokens, None, None), mask)
        return self.encoder(self.embeddings(tokens, scope.positions, token_types, vectors), scope)

    def decode(
        self,
        tokens: mx.array,
        memory: mx.array,
        *,
        memory_lengths: mx.array | None = None,
        cache: Cache | None = None,
    ) -> mx.array:
        """The decoder's output (B, L, dim) for tokens (B, L) and an encoder's output (B, S, dim), from `encode`.

        memory_lengths (B,): valid positions of the memory, the rest is padding.  cache: also keeps what the layers
        make of the memory, so all calls with it must be about the same one.
        Raises UnsupportedModelError unless the model has an encoder and a decoder.
        """
        if not self.config.has_memory:
            raise UnsupportedModelError("this is no encoder-decoder model: its tokens go to model.hidden()")
        self._check(tokens, None, cache)
        mask = AttentionMask(key_lengths=memory_lengths)
        scope = Scope(self._positions(tokens, None, cache), memory_mask=mask)
        return self.decoder(self.embeddings(tokens, scope.positions), scope, cache, memory)

    def logits(self, hidden: mx.array, key_lengths: mx.array | None = None) -> mx.array:
        """Logits (..., V) of hidden states (..., dim), or what a classification head makes of them, (B, L, dim).

        key_lengths (B,): valid tokens of each row, for heads that pool.
        Raises UnsupportedModelError for a model without a head.
        """
        if self.config.head is None:
            raise UnsupportedModelError(
                "this checkpoint has no head, so no logits; model.hidden() gives its hidden states"
            )
        if self.config.predicts_words:
            return self.head(hidden, self.embeddings.token)
        return self.head(hidden, key_lengths)

    def recompute_layers(self, count: int) -> None:
        """Keep less for gradients: the first `count` layers of each stack are computed again when they are needed.

        0, as it is at first, keeps everything. Results and gradients stay the same; has no effect with a cache.
        """
        for stack in (getattr(self, name, None) for name in ("encoder", "decoder")):
            if stack is not None:
                stack._recomputed = count

    def make_cache(self) -> Cache:
        """An empty key/value cache for the decoder. Raises UnsupportedModelError for an encoder-only model."""
        if self.config.decoder is None:
            raise UnsupportedModelError("an encoder-only model sees all tokens at once: there is nothing to cache")
        return Cache(len(self.config.decoder.layers))

    def _positions(
        self,
        tokens: mx.array,
        explicit: mx.array | None,
        cache: Cache | None,
        blocks: mx.array | None = None,
        context: int = 0,
    ) -> TokenPositions:
        if explicit is not None and (explicit.ndim != 2 or explicit.shape[1] != tokens.shape[1]):
            raise UsageError(f"positions have shape {explicit.shape}, but tokens {tokens.shape}")
        offset = 0 if cache is None else cache.length
        table = self.config.embeddings.positions
        end = offset + tokens.shape[1]
        limit = None if table is None else table.limit
        if limit is not None and explicit is None and end > limit:
            raise PromptError(f"{end} tokens are more than the {limit} positions that this model has")
        return TokenPositions(tokens.shape[1], offset, explicit, blocks, context)

    def cache_serves(self, held: int, length: int) -> bool:
        """Whether the keys of a cache of `held` tokens are those that a context of `length` tokens has.

        Not so for positions that are stretched by the length of the context, once that passes the original one.
        """
        scalings = (getattr(layer.attention.positions, "scaling", None) for layer in self.config.stack.layers)
        return all(scaling is None or scaling.agrees(held, length) for scaling in set(scalings))

    def _check_single(
        self,
        token_types: mx.array | None,
        key_lengths: mx.array | None,
        prefix_lengths: mx.array | None,
        memory: mx.array | None,
        cache: Cache | None,
    ) -> None:
        """Raise UsageError for keywords that mean nothing to this model, which has one stack."""
        if token_types is not None and not self.config.embeddings.num_token_types:
            raise UsageError("this model has no token types")
        if memory is not None:
            raise UsageError("memory is for encoder-decoder models; this one has a single stack")
        if self.config.decoder is None and (cache is not None or prefix_lengths is not None):
            raise UsageError("an encoder sees all tokens at once: it takes no cache and no prefix_lengths")
        if cache is not None and key_lengths is not None:
            raise UsageError("padding would stay between the keys of a cache: key_lengths and cache don't go together")

    def _check(self, tokens: mx.array, segments: mx.array | None, cache: Cache | None) -> None:
        if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
            raise UsageError(
                f"tokens are integers of shape (batch, length), not {tokens.dtype} of shape {tokens.shape}"
            )
        if tokens.shape[1] == 0:
            raise PromptError("there are no tokens: at least one is needed")
        if segments is not None and cache is not None:
            raise UsageError("segments describe whole rows of packed documents and can't be used with a cache")
