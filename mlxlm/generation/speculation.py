"""Speculative decoding: cheap guesses of the next tokens, of which one pass of the model keeps those that are right.

The answer is distributed exactly as without it (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318). A guess x from a distribution q is kept with probability min(1, p(x) / q(x)), p being the model's;
the first that is not is replaced by a draw from max(p - q, 0), normalised. With temperature 0 the kept guesses are
those that the model would have taken. Guesses come from a smaller model, from earlier places of the text where the same
words stand (prompt lookup), or from the first layers of the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx

from mlxlm.errors import UsageError
from mlxlm.generation.prompt_cache import PROBE
from mlxlm.generation.requests import Likelihoods, TokenChoice
from mlxlm.generation.sampler import Sampler
from mlxlm.generation.sampling import chosen, penalize
from mlxlm.generation.steps import check_generates, prefill
from mlxlm.layers import Cache

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Where guesses come from; exactly one of the first three.

    draft_model: a smaller model with the same tokenizer.  prompt_lookup: length of the longest run of tokens that is
    looked for earlier in the text; what follows it there is the guess (Saxena 2023, prompt lookup decoding).
    early_exit: guess with that many of the model's first layers, its norm and its head; how good that is depends on
    the model.  num_draft_tokens: guesses a pass, default 3.
    """

    draft_model: Transformer | None = None
    prompt_lookup: int | None = None
    early_exit: int | None = None
    num_draft_tokens: int = 3

    def __post_init__(self) -> None:
        given = [self.draft_model is not None, self.prompt_lookup is not None, self.early_exit is not None]
        if sum(given) != 1:
            raise UsageError("speculation takes exactly one of a draft model, prompt lookup and early exit")
        if self.num_draft_tokens < 1:
            raise UsageError(f"num_draft_tokens is {self.num_draft_tokens}, but must be at least 1")
        if self.prompt_lookup is not None and self.prompt_lookup < 1:
            raise UsageError(f"prompt_lookup is {self.prompt_lookup}, but must be at least 1")

    def proposer(self, model: Transformer, words: int) -> Proposer:
        """What makes the guesses for one answer of `model`, among ids below `words`.

        Raises UsageError for a draft model that has fewer words, or for more layers than the model has.
        """
        if self.prompt_lookup is not None:
            return PromptLookup(self.prompt_lookup)
        draft = self.draft_model
        if draft is None:
            draft = first_layers(model, self.early_exit or 0)
        check_generates(draft)
        if draft.config.has_memory or draft.config.embeddings.vocab_size < words:
            raise UsageError(
                f"the draft model has {draft.config.embeddings.vocab_size} words and is "
                f"{'an encoder-decoder' if draft.config.has_memory else 'a decoder'}; speculation needs a decoder with "
                f"the model's {words} words"
            )
        return DraftModel(draft)


class Guesses(NamedTuple):
    """tokens (k,) int32.  probabilities (k, V): of the distributions they were drawn from, None when certain."""

    tokens: mx.array
    probabilities: mx.array | None


class Proposer(Protocol):
    """Makes guesses for one answer."""

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> Guesses | None:
        """At most `count` guesses of what follows the text, or None."""
        ...


class PromptLookup:
    """Guesses what followed the last tokens where they stood before; the longest run counts, then the latest place."""

    def __init__(self, longest: int):
        # For each length of a run: what comes after its last occurrence.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self._indexed = 0

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> Guesses | None:
        """See `Proposer.propose`."""
        for end in range(self._indexed + 1, len(text)):
            for size, after in enumerate(self._after[:end], 1):
                after[tuple(text[end - size : end])] = end
        self._indexed = len(text) - 1
        for size in range(min(len(self._after), len(text) - 1), 0, -1):
            start = self._after[size - 1].get(tuple(text[-size:]))
            if start is not None:
                return Guesses(mx.array(text[start : start + count], dtype=mx.int32), None)
        return None


class DraftModel:
    """Guesses what a smaller model would say."""

    def __init__(self, model: Transformer):
        self.model = model
        self.cache = model.make_cache()
        self._known = 0  # tokens of the text when it was last asked; what the cache holds behind them were guesses

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> Guesses | None:
        """See `Proposer.propose`. Guesses are drawn with the sampling of the answer, from this model's logits."""
        limit = self.model.config.max_length
        if limit is not None:
            count = min(count, limit - len(text))
        if count < 1:
            return None
        kept = min(self._known, self.cache.length, len(text) - 1)
        self.cache.trim(kept if self.cache.can_trim(kept) else 0)
        logits = self.model.logits(prefill(self.model, list(text), self.cache)[:, -1])
        guesses, rows = [], []
        before = mx.zeros((0,), dtype=mx.int32)
        for number in range(count):
            if number:
                logits = self.model(guesses[-1][:, None], cache=self.cache)[:, -1]
            scores = _scores(sampler, logits, before, last_only=True)
            if sampler.is_greedy:
                guesses.append(mx.argmax(scores, axis=-1).astype(mx.int32))
            else:
                rows.append(mx.softmax(scores, axis=-1))
                guesses.append(mx.argmax(scores + sampler.noise(), axis=-1).astype(mx.int32))
            before = mx.concatenate([before, guesses[-1]])
        self._known = len(text)
        return Guesses(before, mx.concatenate(rows) if rows else None)


def first_layers(model: Transformer, count: int) -> Transformer:
    """A model of the first `count` layers with the same embeddings, norm and head; weights are shared, not copied."""
    config = model.config
    if config.decoder is None or not 1 <= count < len(config.decoder.layers):
        layers = 0 if config.decoder is None else len(config.decoder.layers)
        raise UsageError(f"early exit after {count} layers; the model has {layers}, so valid are 1 to {layers - 1}")
    smaller = replace(config, decoder=replace(config.decoder, layers=config.decoder.layers[:count]))
    draft = type(model)(smaller)
    for name in ("embeddings", "head"):
        setattr(draft, name, getattr(model, name))
    draft.decoder.layers = model.decoder.layers[:count]
    draft.decoder.norm = model.decoder.norm
    if config.decoder.positions is not None:
        draft.decoder.positions = model.decoder.positions
    draft.prompt = model.prompt
    draft.eval()
    return draft


def check_same_tokens(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """Raise UsageError unless the tokenizer of a draft model cuts texts as the model's own does."""
    if other.encode(PROBE) != tokenizer.encode(PROBE):
        raise UsageError("the draft model has another tokenizer: its guesses would be about other words")


def speculative_decode(
    model: Transformer,
    tokens: Sequence[int],
    cache: Cache,
    sampler: Sampler,
    max_tokens: int,
    speculation: Speculation,
    likelihoods: int | None = None,
) -> Iterator[TokenChoice]:
    """Like `decode`, with guesses. Raises UsageError for a model or a cache that can't take tokens back."""
    most = speculation.num_draft_tokens
    if model.config.has_memory:
        raise UsageError("speculation is for decoders, not for encoder-decoder models")
    if cache.takes_back < most:
        raise UsageError(
            "a cache of bounded length forgets for good: guessing ahead needs one without --max-kv-size (max_length)"
        )
    proposer = speculation.proposer(model, sampler.vocab_size)
    return _decode(model, list(tokens), cache, sampler, max_tokens, most, proposer, likelihoods)


def _decode(
    model: Transformer,
    text: list[int],
    cache: Cache,
    sampler: Sampler,
    max_tokens: int,
    most: int,
    proposer: Proposer,
    likelihoods: int | None,
) -> Iterator[TokenChoice]:
    """See `speculative_decode`.  most: guesses a pass."""
    end = len(text) + max_tokens
    try:
        logits = model.logits(prefill(model, text, cache)[0, -1:])
        token = sampler(logits)
        yield from _choices(logits, token, sampler, likelihoods)
        text.append(int(token.item()))
        while len(text) < end:
            # The last token is not in the cache yet; guesses are, for as long as nobody knows better.
            count = min(most, end - len(text) - 1)
            guesses = proposer.propose(text, count, sampler) if count else None
            guessed = mx.zeros((0,), dtype=mx.int32) if guesses is None else guesses.tokens
            fed = mx.concatenate([mx.array(text[-1:], dtype=mx.int32), guessed])[None]
            logits = model(fed, cache=cache)[0]
            kept = _verified(logits, guessed, None if guesses is None else guesses.probabilities, sampler)
            sampler.observe_all(kept)
            # What was guessed right is in the cache already; the token behind it is not.
            cache.trim(len(text) + len(kept) - 1)
            for choice in _choices(logits[: len(kept)], kept, sampler, likelihoods):
                text.append(choice.token)
                yield choice
    finally:
        if cache.length > len(text):
            cache.trim(len(text))


def _choices(logits: mx.array, tokens: mx.array, sampler: Sampler, likelihoods: int | None) -> Iterator[TokenChoice]:
    """The chosen tokens (n,) with their likelihoods by logits (n, V)."""
    known = None if likelihoods is None else Likelihoods.of(logits, tokens, sampler.vocab_size, likelihoods).read()
    for place, token in enumerate(tokens.tolist()):  # type: ignore[arg-type]
        score, likeliest = (None, ()) if known is None else known[place]
        yield TokenChoice(chosen(token), score, likeliest)


def _verified(logits: mx.array, guesses: mx.array, probabilities: mx.array | None, sampler: Sampler) -> mx.array:
    """The guesses (k,) that are kept and one token more, (n + 1,), by the model's logits (k + 1, V) after each of them.

    probabilities (k, V): that the guesses were drawn with, None when they were certain.
    """
    count = guesses.shape[0]
    scores = _scores(sampler, logits, guesses)
    broken = mx.any(mx.isnan(logits[:, : sampler.vocab_size]))
    if sampler.is_greedy:
        own = mx.argmax(scores, axis=-1).astype(mx.int32)
        kept = mx.cumprod((own[:count] == guesses).astype(mx.int32)).sum() if count else mx.array(0)
        tokens = own
    else:
        wanted = mx.softmax(scores, axis=-1)
        if count == 0:
            kept, tokens = mx.array(0), mx.argmax(scores + sampler.noise(), axis=-1).astype(mx.int32)
        else:
            certain = probabilities is None
            q = (mx.arange(wanted.shape[1]) == guesses[:, None]).astype(mx.float32) if certain else probabilities
            p_of, q_of = (mx.take_along_axis(a[:count], guesses[:, None], axis=-1)[:, 0] for a in (wanted, q))
            drawn = mx.random.uniform(shape=(count,), key=sampler.key())
            kept = mx.cumprod((drawn * q_of < p_of).astype(mx.int32)).sum()
            q = mx.concatenate([q, mx.zeros((1, wanted.shape[1]))])
            rest = mx.maximum(wanted[kept] - q[kept], 0.0)
            # Where both are the same up to rounding nothing is left, and nothing was refused for good reason.
            rest = mx.where(rest.sum() > 0, rest, wanted[kept])
            last = mx.argmax(mx.log(rest) + sampler.noise()[0]).astype(mx.int32)
            places = mx.arange(count + 1)
            tokens = mx.where(places == kept, last, mx.concatenate([guesses, guesses[:1]]))
    tokens = mx.where(broken, -1, tokens)
    mx.eval(kept, tokens)
    return tokens[: int(kept.item()) + 1]


def _scores(sampler: Sampler, logits: mx.array, guesses: mx.array, last_only: bool = False) -> mx.array:
    """What tokens are chosen by, (k + 1, V) float32, from logits (k + 1, V) after each of k guesses.

    last_only: logits (1, V) are those after the last guess.
    """
    logits = logits[:, : sampler.vocab_size]
    seen = sampler.seen_after(guesses)
    if seen is not None:
        logits = penalize(logits.astype(mx.float32), seen[-1:] if last_only else seen, sampler.penalty)
    logits = sampler.biased(logits)
    return logits.astype(mx.float32) if sampler.is_greedy else sampler.filtered(logits)
