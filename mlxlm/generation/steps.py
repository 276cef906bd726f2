"""Feeding a model token after token: the one place that knows whether a prompt goes to a decoder or to an encoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxlm.errors import PromptError, UnsupportedModelError
from mlxlm.generation.plan import SHORTEST_CHUNK, prefill_chunk
from mlxlm.generation.stepping import decoding_cache, default_stepping, make_step
from mlxlm.layers import Cache

if TYPE_CHECKING:
    from mlxlm.models import Transformer


def check_generates(model: Transformer) -> None:
    """Raise UnsupportedModelError unless the model can generate text."""
    if model.config.decoder is None:
        raise UnsupportedModelError(
            "an encoder-only model can't generate text; it fills masks (fill-mask) and embeds (embed)"
        )
    if model.config.fills_blanks:
        raise UnsupportedModelError("this model fills blanks, it does not continue texts; use fill-mask (fill_blanks)")
    if not model.config.predicts_words:
        kind = "no head" if model.config.head is None else "a classification head"
        raise UnsupportedModelError(f"this checkpoint has {kind}, no language-model head, so it can't generate text")


def check_ids(model: Transformer, tokens: Sequence[int]) -> None:
    """Raise PromptError for a token id that the model doesn't have."""
    rows = model.config.embeddings.vocab_size
    outside = [token for token in tokens if not 0 <= token < rows]
    if outside:
        raise PromptError(f"the prompt has token id {outside[0]}, but the model's ids run from 0 to {rows - 1}")


def room(model: Transformer, tokens: Sequence[int], max_tokens: int) -> int:
    """How many tokens may follow a prompt. Raises PromptError for a prompt that fills the context."""
    limit = model.config.max_length
    if limit is None:
        return max_tokens
    limit -= model.virtual_length
    if model.config.has_memory:
        # The prompt has the encoder for itself, the answer the decoder, with one position for its start.
        if len(tokens) > limit:
            raise PromptError(f"the prompt has {len(tokens)} tokens, but the model's context is {limit}; shorten it")
        return min(max_tokens, limit - 1)
    if len(tokens) >= limit:
        raise PromptError(f"the prompt has {len(tokens)} tokens, but the model's context is {limit}; shorten it")
    return min(max_tokens, limit - len(tokens))


def pad(rows: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
    """Rows of token ids as one array (B, L), padded on the right with 0, and their lengths (B,)."""
    longest = max(map(len, rows))
    tokens = mx.array([[*row, *[0] * (longest - len(row))] for row in rows])
    return tokens, mx.array([len(row) for row in rows])


class Steps:
    """A decoder that continues one prompt: `start` with the prompt, then `step` with what was chosen.

    model: with a decoder and a language-model head.  cache: may hold the beginning of the prompt; default an empty one.
    """

    def __init__(self, model: Transformer, cache: Cache | None = None):
        self.model = model
        self.cache = decoding_cache(model) if cache is None else cache
        self.stepping = default_stepping(model)
        self._step = make_step(model, self.stepping)

    def start(self, rows: Sequence[Sequence[int]]) -> mx.array:
        """Logits (B, V) of the first token after each row; here B is 1."""
        (tokens,) = rows
        return self.model.logits(prefill(self.model, tokens, self.cache)[:, -1])

    def step(self, tokens: mx.array) -> mx.array:
        """Logits (B, V) of what follows tokens (B,)."""
        return self._step(tokens, self.cache)

    def read(self, tokens: Sequence[int]) -> mx.array:
        """Like `start` for one prompt that the cache holds nothing of; hidden states (n, dim) of all decoder tokens."""
        return mx.concatenate(list(passes(self.model, tokens, self.cache)), axis=1)[0]

    def look(self, tokens: mx.array) -> mx.array:
        """Like `step`; hidden states (B, dim) of the tokens."""
        return self.model.hidden(tokens[:, None], cache=self.cache)[:, -1]

    def take(self, rows: Sequence[int]) -> None:
        """Go on with other rows: row i continues what row rows[i] did."""
        self.cache.take(mx.array(list(rows)))


class MemorySteps(Steps):
    """A decoder that answers what an encoder read, for several prompts of any length at once. See `Steps`."""

    def start(self, rows: Sequence[Sequence[int]]) -> mx.array:
        """See `Steps.start`: B rows go to the encoder, the decoder begins with its start token."""
        return self.model.logits(self._begin(rows))

    def step(self, tokens: mx.array) -> mx.array:
        """See `Steps.step`."""
        return self.model.logits(self.look(tokens))

    def read(self, tokens: Sequence[int]) -> mx.array:
        """See `Steps.read`: the decoder has read its start token."""
        return self._begin([tokens])

    def look(self, tokens: mx.array) -> mx.array:
        """See `Steps.look`."""
        hidden = self.model.decode(tokens[:, None], self.memory, memory_lengths=self.lengths, cache=self.cache)
        return hidden[:, -1]

    def _begin(self, rows: Sequence[Sequence[int]]) -> mx.array:
        """Hidden states (B, dim) of the decoder's start token."""
        tokens, lengths = pad(rows)
        self.lengths = lengths if len(set(map(len, rows))) > 1 else None
        self.memory = self.model.encode(tokens, key_lengths=self.lengths)
        self.prompts = list(range(len(rows)))
        return self.look(mx.full((len(rows),), self.model.config.decoder_start, dtype=mx.int32))

    def take(self, rows: Sequence[int]) -> None:
        """See `Steps.take`."""
        prompts = [self.prompts[row] for row in rows]
        # The beams of a prompt change places all the time, but what they know of it is the same.
        same = prompts == self.prompts
        chosen = mx.array(list(rows))
        self.cache.take(chosen, memory=not same)
        if not same:
            self.prompts, self.memory = prompts, self.memory[chosen]
            self.lengths = None if self.lengths is None else self.lengths[chosen]


def make_steps(model: Transformer, cache: Cache | None = None) -> Steps:
    """The `Steps` that fit the model. Raises UnsupportedModelError for a model that can't generate."""
    check_generates(model)
    return MemorySteps(model, cache) if model.config.has_memory else Steps(model, cache)


def prefill(model: Transformer, tokens: Sequence[int], cache: Cache, chunk: int | None = None) -> mx.array:
    """Feed the tokens that the cache doesn't hold; hidden states (1, n, dim) of the last chunk. See `passes`."""
    (hidden,) = deque(passes(model, tokens, cache, chunk), maxlen=1)
    return hidden


def passes(model: Transformer, tokens: Sequence[int], cache: Cache, chunk: int | None = None) -> Iterator[mx.array]:
    """Feed the tokens that the cache doesn't hold, chunk by chunk; hidden states (1, n, dim) of each.

    A cache whose keys don't serve in so long a context is filled anew.  chunk: tokens at once, default what the memory
    plan says.
    """
    total = len(tokens)
    if cache.length and not model.cache_serves(cache.length, total):
        cache.trim(0)
    left = mx.array(list(tokens[cache.length :]))[None]
    if chunk is None:
        chunk = left.shape[1] if left.shape[1] <= SHORTEST_CHUNK else prefill_chunk(model)
    while left.shape[1] > chunk:
        hidden = model.hidden(left[:, :chunk], cache=cache, context=total)
        mx.eval(cache.arrays())
        yield hidden
        left = left[:, chunk:]
    yield model.hidden(left, cache=cache, context=total)
