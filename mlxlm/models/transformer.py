"""The one Transformer: encoder, decoder, or both, as its configuration says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn

from mlxlm.errors import PromptError, UnsupportedModelError, UsageError
from mlxlm.kernels import AttentionMask
from mlxlm.layers import (
    AlibiSpec,
    Cache,
    CacheSpec,
    NormalizedPositionsSpec,
    Prefix,
    Scope,
    TokenPositions,
    VirtualTokens,
    shifted,
)
from mlxlm.layers.virtual import StackName
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.heads import SequenceHeadSpec
from mlxlm.models.recomputation import Aside, arrays_within, chance, drawn_key, recomputed
from mlxlm.models.stored_weights import StoredWeights


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
        # What such layers run in, see `recomputed`.
        self._aside: Aside | None = None

    def __call__(
        self,
        x: mx.array,
        scope: Scope,
        cache: Cache | None = None,
        memory: mx.array | None = None,
        prefixes: list[Prefix] | None = None,
    ) -> mx.array:
        """x (B, L, dim) -> (B, L, dim).  memory (B, S, dim): an encoder's output, for cross-attention.

        prefixes: of each layer, keys and values before those of the tokens.
        """
        if self.spec.positions is not None:
            scope.shared = self.positions
        x = self.enter(x)
        for index, layer in enumerate(self.layers):
            if prefixes is not None:
                scope = replace(scope, prefix=prefixes[index])
            if index < self._recomputed and cache is None:
                x = self._recompute(layer, x, scope, memory)
            else:
                x = layer(x, scope, None if cache is None else cache[index], memory)
        return self.leave(x)

    def enter(self, x: mx.array) -> mx.array:
        """What is done before the first layer."""
        return self.dropout(x)

    def leave(self, x: mx.array) -> mx.array:
        """What is done after the last layer."""
        return self.dropout(self.norm(x))

    def _recompute(self, layer: nn.Module, x: mx.array, scope: Scope, memory: mx.array | None) -> mx.array:
        """The layer's output, of which nothing but the inputs is kept for the gradients, see `recomputed`."""
        shared = self.positions if self.spec.positions is not None else None

        prefix = None if scope.prefix is None else scope.prefix.arrays()

        def run(
            own: dict[str, Any],
            common: dict[str, Any],
            x: mx.array,
            memory: mx.array | None,
            prefix: list[mx.array | None] | None,
            key: mx.array | None,
        ) -> mx.array:
            layer.update(own)
            if shared is not None:
                shared.update(common)
            given = replace(scope, prefix=None if prefix is None else Prefix(*prefix), _terms={})
            with chance(key):
                return layer(x, given, None, memory)

        key = drawn_key(layer)
        common = {} if shared is None else shared.trainable_parameters()
        own = layer.trainable_parameters()
        aside = self._aside if key is None else None
        if aside is not None:
            # What it reads beside its arguments must be there: it is not computed where the layer runs.
            mx.eval([*arrays_within(scope), *arrays_within(layer)])
        y = recomputed(run, aside)(own, common, x, memory, prefix, key)
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
    vectors (B, L, dim): instead of the tokens' embeddings.  cache: from `make_cache`; the tokens continue it, each row
    its own, and grow it by key_lengths where these are given (which takes a `CacheSpec(ragged=True)`).

    `prompt`, a `VirtualTokens` module, may be set: what it holds is read before the tokens of every row. All that is
    given and returned is about the real tokens, but heads over whole sequences pool over the virtual ones too.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.prompt: VirtualTokens | None = None
        # Which of how many equal parts of every row this model is given. No parameter to mlx.nn.
        self._parts = (0, 1)
        # Whether all of it is in this process, so that calls of it talk to no other.
        self._alone = True
        # Where weights are that have not been read yet.
        self._stored: StoredWeights | None = None
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
        lengths, count = keywords.get("key_lengths"), self.virtual_length
        if not count or not isinstance(self.config.head, SequenceHeadSpec):
            return self.logits(self.hidden(tokens, **keywords), lengths)  # type: ignore[arg-type]
        hidden = self._hidden(tokens, **keywords)
        extra = hidden.shape[1] - tokens.shape[1]
        return self.logits(hidden, None if lengths is None else lengths + extra)  # type: ignore[operator]

    @property
    def virtual_length(self) -> int:
        """Positions that virtual tokens take before the first real one, 0 without any."""
        return 0 if self.prompt is None else self.prompt.length

    def hidden(self, tokens: mx.array, **keywords: Any) -> mx.array:
        """Last hidden states (B, L, dim) of the tokens, after the final norm; keywords are those of the class.

        With encoder and decoder: `tokens` go to the encoder, `decoder_tokens` to the decoder (a head over labels can do
        without); `memory` (B, S, dim), from `encode`, saves encoding the same tokens again.  context: tokens of the
        whole prompt, when these are a chunk of it; positions that depend on the length of the context are then those of
        the whole.
        """
        hidden = self._hidden(tokens, **keywords)
        given = keywords.get("decoder_tokens")
        told = tokens if given is None else given
        return hidden[:, hidden.shape[1] - told.shape[1] :]

    def _hidden(
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
        """See `hidden`; those of virtual tokens come first."""
        self._check(tokens, segments, cache)
        if blocks is not None and not self.config.fills_blanks:
            raise UsageError("blocks are for models whose positions have two coordinates; those of this one have one")
        if self.config.has_memory:
            decoder_tokens = self._decoder_tokens(tokens, decoder_tokens)
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
        counts = None
        if cache is not None and key_lengths is not None:
            # What pads these rows comes after their tokens, and the next tokens are written over it.
            counts, key_lengths = key_lengths.tolist(), None
        mask = AttentionMask(
            key_lengths=key_lengths, prefix_lengths=prefix_lengths, query_segments=segments, key_segments=segments
        )
        stack: StackName = "encoder" if self.config.decoder is None else "decoder"
        own = (positions, blocks, context)
        x, scope = self._embed(stack, tokens, mask, cache, own, token_types=token_types, vectors=vectors)
        hidden: mx.array = getattr(self, stack)(x, scope, cache, prefixes=self._prefixes(stack))
        if cache is not None:
            cache.advance(tokens.shape[1], counts)
        return hidden

    def encode(
        self,
        tokens: mx.array,
        *,
        key_lengths: mx.array | None = None,
        token_types: mx.array | None = None,
        segments: mx.array | None = None,
        vectors: mx.array | None = None,
    ) -> mx.array:
        """The encoder's output (B, S, dim): the memory of an encoder-decoder model, virtual tokens included.

        Raises UnsupportedModelError for a model without an encoder.
        """
        if self.config.encoder is None:
            raise UnsupportedModelError("this model has no encoder; model.hidden() gives its hidden states")
        self._check(tokens, segments, None)
        mask = AttentionMask(key_lengths=key_lengths, query_segments=segments, key_segments=segments)
        x, scope = self._embed("encoder", tokens, mask, None, token_types=token_types, vectors=vectors)
        return self.encoder(x, scope, prefixes=self._prefixes("encoder"))

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
        given = None if self.prompt is None else self.prompt.vectors("encoder")
        memory_mask = shifted(AttentionMask(key_lengths=memory_lengths), 0 if given is None else given.shape[0])
        x, scope = self._embed("decoder", tokens, AttentionMask(), cache)
        scope.memory_mask = memory_mask
        hidden = self.decoder(x, scope, cache, memory, self._prefixes("decoder"))
        if cache is not None:
            cache.advance(tokens.shape[1])
        return hidden

    def _prefixes(self, stack: StackName) -> list[Prefix] | None:
        return None if self.prompt is None else self.prompt.prefixes(stack)

    def _embed(
        self,
        stack: StackName,
        tokens: mx.array,
        mask: AttentionMask,
        cache: Cache | None,
        own: tuple[mx.array | None, mx.array | None, int] = (None, None, 0),
        *,
        token_types: mx.array | None = None,
        vectors: mx.array | None = None,
    ) -> tuple[mx.array, Scope]:
        """What goes into a stack, (B, L, dim), virtual tokens first unless the cache holds them, and its scope.

        own: positions, blocks and context, as `hidden` takes them.  mask: of the real tokens.
        """
        if self.prompt is None:
            scope = Scope(self._positions(tokens, own[0], cache, *own[1:]), mask, slots=_slots(cache))
            return self.embeddings(tokens, scope.positions, token_types, vectors), scope
        offset, given = self.prompt.offset(stack), self.prompt.vectors(stack)
        if given is not None and cache is not None and cache[0].length:
            given = None  # they are between the keys already
        positions, blocks, context = own
        if given is None:
            explicit = None if positions is None else positions + offset
            places = self._positions(tokens, explicit, cache, blocks, context + offset if context else 0, offset)
            return self.embeddings(tokens, places, token_types, vectors), Scope(places, mask, slots=_slots(cache))
        count = given.shape[0]
        batch = tokens.shape[0]
        if cache is not None:
            cache.begin(count)
        if positions is not None:
            first = mx.broadcast_to(mx.arange(count, dtype=positions.dtype)[None], (positions.shape[0], count))
            positions = mx.concatenate([first, positions + offset], axis=1)
        padded = mx.pad(tokens, [(0, 0), (count, 0)])
        blocks = None if blocks is None else mx.pad(blocks, [(0, 0), (count, 0)])
        token_types = None if token_types is None else mx.pad(token_types, [(0, 0), (count, 0)])
        places = self._positions(padded, positions, None, blocks, context + count if context else 0)
        held = self.embeddings.token(tokens) if vectors is None else vectors
        first = mx.broadcast_to(given.astype(held.dtype)[None], (batch, *given.shape))
        x = self.embeddings(padded, places, token_types, mx.concatenate([first, held], axis=1))
        # Packed documents keep the mask of the real tokens: attention takes the virtual ones apart.
        mask = mask if mask.query_segments is not None else shifted(mask, count)
        return x, Scope(places, mask, virtual=count)

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

    def join_projections(self) -> None:
        """Compute what reads the same input as one in decoding steps, see `mlxlm.layers.joined`; for inference.

        Names, weights and results stay the same. Layers whose weights are replaced later go back to what they were
        until this is called again.
        """
        for stack in (getattr(self, name, None) for name in ("encoder", "decoder")):
            for layer in stack.layers if stack is not None else ():
                layer.attention.join()
                layer.feed_forward.join()

    def train(self, mode: bool = True) -> Transformer:
        """See `mlx.nn.Module.train`. What was joined for inference is let go: compiled training steps run no code that
        would notice, and it would stand beside the weights that are trained.
        """
        if mode and not self.training:
            for module in self.modules():
                if getattr(module, "_joined", None) is not None:
                    module._joined = None
        super().train(mode)
        return self

    def make_cache(self, spec: CacheSpec | None = None) -> Cache:
        """An empty key/value cache for the decoder, see `CacheSpec`. Raises UnsupportedModelError for an encoder-only
        model.
        """
        if self.config.decoder is None:
            raise UnsupportedModelError("an encoder-only model sees all tokens at once: there is nothing to cache")
        spec = CacheSpec() if spec is None else spec
        stack = self.config.decoder
        distances = stack.positions is not None or isinstance(stack.layers[0].attention.positions, AlibiSpec)
        return spec.build([layer.attention.window for layer in stack.layers], distances)

    def _positions(
        self,
        tokens: mx.array,
        explicit: mx.array | None,
        cache: Cache | None,
        blocks: mx.array | None = None,
        context: int = 0,
        first: int = 0,
    ) -> TokenPositions:
        if explicit is not None and (explicit.ndim != 2 or explicit.shape[1] != tokens.shape[1]):
            raise UsageError(f"positions have shape {explicit.shape}, but tokens {tokens.shape}")
        part, parts = self._parts
        offset: int | mx.array = first + part * tokens.shape[1]
        if cache is not None:
            offset = offset + cache.offset if offset else cache.offset
        if parts > 1:
            context = max(context, parts * tokens.shape[1])
        if explicit is None and (cache is None or cache.place is None):
            self.check_room(cache, first + parts * tokens.shape[1])
        return TokenPositions(tokens.shape[1], offset, explicit, blocks, context)

    def check_room(self, cache: Cache | None, num_tokens: int) -> None:
        """Raise PromptError when so many tokens more than a cache holds have no positions in this model."""
        table = self.config.embeddings.positions
        limit = None if table is None else table.limit
        if limit is not None and (end := num_tokens + (0 if cache is None else cache.length)) > limit:
            raise PromptError(f"{end} tokens are more than the {limit} positions that this model has")

    @property
    def rows_are_independent(self) -> bool:
        """Whether rows of different lengths may go through one pass: no position depends on the longest of them."""
        added = self.config.embeddings.positions
        return self.cache_serves(1, 2**30) and not (isinstance(added, NormalizedPositionsSpec) and added.length is None)

    def cache_serves(self, held: int, length: int) -> bool:
        """Whether the keys of a cache of `held` tokens are those that a context of `length` tokens has.

        Not so for positions that are stretched by the length of the context, once that passes the original one.
        """
        held, length = held + self.virtual_length, length + self.virtual_length
        scalings = (getattr(layer.attention.positions, "scaling", None) for layer in self.config.stack.layers)
        return all(scaling is None or scaling.agrees(held, length) for scaling in set(scalings))

    def _decoder_tokens(self, tokens: mx.array, given: mx.array | None) -> mx.array:
        """What the decoder behind an encoder reads: a head over labels has it read the encoder's tokens again, after
        the token that it begins with (Lewis et al. 2019, arXiv:1910.13461, section 3).
        """
        of_labels = self.config.head is not None and not self.config.predicts_words
        if given is None and not of_labels:
            raise UsageError("an encoder-decoder model needs decoder_tokens")
        if given is None:
            start = mx.full((tokens.shape[0], 1), self.config.decoder_start, dtype=tokens.dtype)
            return mx.concatenate([start, tokens[:, :-1]], axis=1)
        if of_labels and given.shape != tokens.shape:
            raise UsageError(f"decoder_tokens have shape {given.shape}; a head over labels needs {tokens.shape}")
        return given

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
        if cache is not None and key_lengths is not None and not all(layer.joins for layer in cache):
            raise UsageError("rows of different lengths need a cache made with CacheSpec(ragged=True)")
        if self.config.decoder is None and (cache is not None or prefix_lengths is not None):
            raise UsageError("an encoder sees all tokens at once: it takes no cache and no prefix_lengths")

    def _check(self, tokens: mx.array, segments: mx.array | None, cache: Cache | None) -> None:
        if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
            raise UsageError(
                f"tokens are integers of shape (batch, length), not {tokens.dtype} of shape {tokens.shape}"
            )
        if tokens.shape[1] == 0:
            raise PromptError("there are no tokens: at least one is needed")
        if segments is not None and cache is not None:
            raise UsageError("segments describe whole rows of packed documents and can't be used with a cache")


def _slots(cache: Cache | None) -> mx.array | None:
    return None if cache is None else cache.slots
