"""What a batch is asked for, and what it gives: requests, tokens, completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import mlx.core as mx

from mlxlm.errors import UsageError
from mlxlm.generation.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]


class Processor(Protocol):
    """What changes the logits of one answer as it grows, such as a grammar that the answer must follow.

    One object serves one answer. It is called once before each token, in order.
    """

    def __call__(self, answer: Sequence[int]) -> mx.array | None:
        """What to add to the logits, float (V,) with -inf for what may not come next, or None for nothing.

        answer: tokens so far. V is the number of words that model and tokenizer have in common.
        """
        ...


def added(processors: Sequence[Processor], answer: Sequence[int], words: int) -> mx.array | None:
    """What all processors add to the logits of `words` words, (words,); None for nothing."""
    total: mx.array | None = None
    for processor in processors:
        given = processor(answer)
        if given is not None:
            given = given[:words]
            total = given if total is None else total + given
    return total


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to answer it.

    tokens: of the prompt, at least one.  max_tokens: of the answer, default 100.  stop_tokens: ids that end it.
    sampling: default greedy.  likelihoods: None for none (the default); 0 for the log probability of each token of the
    answer; n for those of the n likeliest tokens at each place too.  processors: see `Processor`.
    """

    tokens: tuple[int, ...]
    max_tokens: int = 100
    stop_tokens: frozenset[int] = frozenset()
    sampling: Sampling = Sampling()
    likelihoods: int | None = None
    processors: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}, but at least one token must be generated")
        if self.likelihoods is not None and self.likelihoods < 0:
            raise UsageError(f"likelihoods is {self.likelihoods}, but must be 0 or more")


@dataclass(frozen=True)
class TokenChoice:
    """A token of an answer.

    token: its id.  log_probability: of it by the model (temperature 1, before any sampling option), None unless asked
    for.  likeliest: ids and log probabilities of the likeliest tokens there, best first.
    finish_reason: None, or why the answer ends with this token: "stop" (it is a stop token) or "length".
    """

    token: int
    log_probability: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer.

    tokens: its ids, with the stop token that ended it.  log_probabilities: of each, empty unless asked for.
    likeliest: see `TokenChoice`, one entry a token where asked for.  finish_reason: "stop", "length" or "cancelled".
    """

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...] = ()
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish_reason: FinishReason

    @classmethod
    def of(cls, choices: Sequence[TokenChoice], reason: FinishReason | None = None) -> Completion:
        """From its tokens in order.  reason: of an answer that has no last token."""
        end = reason or (choices[-1].finish_reason if choices else None)
        return cls(
            tokens=tuple(choice.token for choice in choices),
            log_probabilities=tuple(c.log_probability for c in choices if c.log_probability is not None),
            likeliest=tuple(choice.likeliest for choice in choices if choice.likeliest),
            finish_reason=end or "cancelled",
        )

    @property
    def mean_log_probability(self) -> float:
        """Of its tokens. Raises UsageError when they were not asked for."""
        if not self.log_probabilities:
            raise UsageError("the log probabilities of this answer were not asked for: give likelihoods=0")
        return sum(self.log_probabilities) / len(self.log_probabilities)

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens


class Likelihoods:
    """Log probabilities of one step of a batch, on the device until they are read.

    chosen (B,): of the tokens that were chosen.  ids, values (B, n): the n likeliest tokens and theirs, best first.
    """

    def __init__(self, chosen: mx.array, ids: mx.array, values: mx.array):
        self.chosen, self.ids, self.values = chosen, ids, values

    @classmethod
    def of(cls, logits: mx.array, tokens: mx.array, words: int, likeliest: int) -> Likelihoods:
        """Of tokens (B,) by logits (B, V), of which the first `words` count, and of the likeliest ones there."""
        scores = logits[:, :words].astype(mx.float32)
        scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(scores, mx.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
        likeliest = min(likeliest, words)
        if not likeliest:
            empty = cls.empty(chosen.shape[0])
            return cls(chosen, empty.ids, empty.values)
        ids = mx.argpartition(-scores, likeliest - 1, axis=-1)[:, :likeliest]
        values = mx.take_along_axis(scores, ids, axis=-1)
        order = mx.argsort(-values, axis=-1)
        return cls(chosen, mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(values, order, axis=-1))

    @classmethod
    def empty(cls, rows: int) -> Likelihoods:
        """Zeros for rows that want none."""
        return cls(mx.zeros((rows,)), mx.zeros((rows, 0), dtype=mx.uint32), mx.zeros((rows, 0)))

    @property
    def width(self) -> int:
        """How many likeliest tokens there are."""
        return self.ids.shape[1]

    def join(self, other: Likelihoods) -> Likelihoods:
        """The rows of both, one after another."""
        width = max(self.width, other.width)
        parts = [
            (one.chosen, *(mx.pad(a, [(0, 0), (0, width - one.width)]) for a in (one.ids, one.values)))
            for one in (self, other)
        ]
        return Likelihoods(*(mx.concatenate(pair) for pair in zip(*parts, strict=True)))

    def take(self, rows: mx.array) -> Likelihoods:
        """Row i is row rows[i] of these."""
        return Likelihoods(self.chosen[rows], self.ids[rows], self.values[rows])

    def arrays(self) -> list[mx.array]:
        """What to evaluate."""
        return [self.chosen, self.ids, self.values] if self.width else [self.chosen]

    def read(self) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
        """Of each row: the log probability of its token, and the likeliest tokens with theirs."""
        chosen: list[float] = self.chosen.tolist()  # type: ignore[assignment]
        if not self.width:
            return [(value, ()) for value in chosen]
        pairs = zip(self.ids.tolist(), self.values.tolist(), strict=True)  # type: ignore[arg-type]
        return [(value, tuple(zip(*pair, strict=True))) for value, pair in zip(chosen, pairs, strict=True)]
