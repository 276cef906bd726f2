"""Contrastive search: of the likeliest next tokens the one that repeats least of what the model has in mind already.

Each of the k likeliest tokens v is read, which gives its hidden state h_v; the next token is the one with the largest

    (1 - alpha) * p(v) - alpha * max over j of cos(h_v, h_j)

where j runs over prompt and answer so far (Su et al. 2022, arXiv:2202.06417, equation 5). The candidates are rows of
one pass. They differ in their last token alone, so the caches of all rows take over that token of the chosen one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxlm.errors import SamplingError, UsageError
from mlxlm.generation.requests import Likelihoods, Processor, TokenChoice, added
from mlxlm.generation.sampler import Sampler
from mlxlm.generation.sampling import Sampling, chosen
from mlxlm.generation.steps import make_steps
from mlxlm.layers import Cache

if TYPE_CHECKING:
    from mlxlm.models import Transformer

_MOST = 256


@dataclass(frozen=True, kw_only=True)
class ContrastiveSearch:
    """How the next token is chosen by contrastive search.

    alpha: weight of the penalty for repeating, 0 (the likeliest token wins) to 1 (probabilities don't count), default
    0.6.  top_k: candidates, 2 to 256, default 4; each is read by the model, so hundreds would be a mistake.

    Raises SamplingError for values outside their domain.
    """

    alpha: float = 0.6
    top_k: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SamplingError(f"alpha of contrastive search is {self.alpha}, but must be between 0 and 1")
        if not 2 <= self.top_k <= _MOST:
            raise SamplingError(
                f"contrastive search reads each of its top_k {self.top_k} tokens; valid are 2 to {_MOST}, usual 4 to 10"
            )

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise SamplingError for a sampling that draws at random."""
        if sampling.temperature or sampling.top_k or sampling.top_p < 1 or sampling.min_p:
            raise SamplingError(
                "contrastive search draws nothing at random: it goes with no temperature, top_p and min_p, and has a "
                "top_k of its own"
            )


def contrastive_decode(
    model: Transformer,
    tokens: list[int],
    cache: Cache,
    sampler: Sampler,
    max_tokens: int,
    search: ContrastiveSearch,
    likelihoods: int | None = None,
    processors: Sequence[Processor] = (),
) -> Iterator[TokenChoice]:
    """Like `decode`, by contrastive search. The cache is empty at first and holds all tokens that were yielded.

    Raises UsageError for a cache that holds the beginning of the prompt: its hidden states are not known any more.
    """
    if cache.length:
        raise UsageError("contrastive search compares with the hidden states of the whole prompt: give no filled cache")
    return _decode(_Candidates(model, cache, sampler, search), tokens, max_tokens, likelihoods, processors)


def _decode(
    candidates: _Candidates,
    tokens: list[int],
    max_tokens: int,
    likelihoods: int | None,
    processors: Sequence[Processor],
) -> Iterator[TokenChoice]:
    sampler, cache = candidates.sampler, candidates.steps.cache
    answer: list[int] = []

    def choose() -> tuple[mx.array, Likelihoods | None]:
        logits = candidates.logits
        token = candidates.choose(added(processors, answer, sampler.vocab_size))
        known = None if likelihoods is None else Likelihoods.of(logits, token, sampler.vocab_size, likelihoods)
        mx.async_eval(token, *(known.arrays() if known else ()))
        return token, known

    # As in `decode`; but a token is read when it is chosen, so one more must be taken back from whoever stops early.
    has_memory = candidates.model.config.has_memory
    ahead = 0 if processors else 1 if has_memory else min(1, cache.takes_back)
    if not has_memory:
        cache.bound(len(tokens) + max_tokens)
    candidates.start(tokens)
    launched: deque[tuple[mx.array, Likelihoods | None]] = deque()
    left = max_tokens
    try:
        while left or launched:
            while left and len(launched) <= ahead:
                launched.append(choose())
                left -= 1
            token, known = launched.popleft()
            score, likeliest = (None, ()) if known is None else known.read()[0]
            answer.append(chosen(int(token.item())))
            yield TokenChoice(answer[-1], score, likeliest)
    finally:
        if not has_memory:
            cache.take([0])
            cache.trim(min(cache.length, len(tokens) + len(answer)))


class _Candidates:
    """The continuations that are weighed: one row of the cache each.

    logits (1, V): of the next token, by the model.
    """

    def __init__(self, model: Transformer, cache: Cache, sampler: Sampler, search: ContrastiveSearch):
        self.model, self.sampler, self.search = model, sampler, search
        self.steps = make_steps(model, cache)
        self.count = min(search.top_k, sampler.vocab_size)

    def start(self, tokens: list[int]) -> None:
        """Read the prompt."""
        hidden = self.steps.read(tokens)
        self.logits = self.model.logits(hidden[-1:])
        self._seen = _Directions(hidden)
        self.steps.take([0] * self.count)

    def choose(self, changes: mx.array | None) -> mx.array:
        """The next token, (1,) int32, -1 where logits are not numbers; it is read.  changes (V,): added to logits."""
        alpha, words = self.search.alpha, self.sampler.vocab_size
        logits = self.logits[:, :words]
        broken = mx.any(mx.isnan(logits))
        processed = self.sampler.processed(logits, None if changes is None else changes[None])
        probabilities = mx.softmax(processed[0].astype(mx.float32), precise=True)
        likeliest = mx.argpartition(-probabilities, self.count - 1)[: self.count]
        # The likeliest first, so that it wins where several are worth the same.
        likeliest = likeliest[mx.argsort(-probabilities[likeliest])].astype(mx.int32)
        share = probabilities[likeliest]
        hidden = self.steps.look(likeliest)
        directions = _directions(hidden)
        worth = (1 - alpha) * share - alpha * self._seen.nearest(directions)
        # What may not come next stands among the candidates where less than k tokens may.
        best = mx.argmax(mx.where(share > 0, worth, -mx.inf))
        self.steps.cache.adopt(best)
        self._seen.append(directions[best])
        self.logits = self.model.logits(hidden[best][None])
        token = likeliest[best][None]
        self.sampler.observe(token)
        return mx.where(broken, -1, token)


def _directions(hidden: mx.array) -> mx.array:
    """Vectors (n, D) of length 1, float32."""
    hidden = hidden.astype(mx.float32)
    return hidden / mx.maximum(mx.linalg.norm(hidden, axis=-1, keepdims=True), 1e-12)


class _Directions:
    """The directions of the hidden states so far, in an array that grows in blocks."""

    block = 256

    def __init__(self, hidden: mx.array):
        """hidden (n, D): the first ones."""
        self._held, self._count = _directions(hidden), hidden.shape[0]

    def append(self, direction: mx.array) -> None:
        """One more, (D,)."""
        if self._count == self._held.shape[0]:
            room = mx.zeros((self.block, self._held.shape[1]))
            self._held = mx.concatenate([self._held, room])
        self._held[self._count] = direction
        self._count += 1

    def nearest(self, directions: mx.array) -> mx.array:
        """For each of directions (k, D) its largest cosine with those held, (k,)."""
        return mx.max(directions @ self._held[: self._count].T, axis=-1)
