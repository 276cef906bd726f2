"""Beam search: the likeliest answers as a whole, not token by token.

At each step every one of `num_beams` unfinished answers is continued with all words; the best continuations go on, and
those that end compete for `num_beams` places by log probability / length ** length_penalty. The definition, with its
three kinds of early stopping, is that of transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import mlx.core as mx
import numpy as np

from mlxlm.errors import SamplingError, UsageError
from mlxlm.generation.decoding import Prompt, prompt_tokens
from mlxlm.generation.sampling import broken_logits
from mlxlm.generation.steps import check_generates, check_ids, make_steps, room

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True, kw_only=True)
class Beams:
    """How the likeliest answers are searched.

    num_beams: unfinished answers that are pursued at once, default 4.
    num_return: answers to give back, at most num_beams, default 1.
    length_penalty: an answer's score is its log probability / length ** length_penalty, the stop token counted; more
        than 0 favours long answers, less short ones (Wu et al. 2016, arXiv:1609.08144). Default 1.
    early_stopping: True ends as soon as num_beams answers are finished. False, the default, also goes on as long as
        the best unfinished one, taken at its present length, beats the worst finished one; "never" as long as any
        later length could.

    Raises SamplingError for values outside their domain.
    """

    num_beams: int = 4
    num_return: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise SamplingError(f"num_beams is {self.num_beams}, but must be at least 1")
        if not 1 <= self.num_return <= self.num_beams:
            raise SamplingError(
                f"num_return is {self.num_return}, but must be between 1 and the {self.num_beams} beams"
            )
        if not np.isfinite(self.length_penalty):
            raise SamplingError(f"length_penalty is {self.length_penalty}, but must be a finite number")
        if self.early_stopping not in (True, False, "never"):
            raise SamplingError(f"early_stopping is {self.early_stopping!r}, but must be True, False or 'never'")


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One answer.  text: of it.  tokens: its ids, with the stop token that ended it.  score: see `Beams`."""

    text: str
    tokens: tuple[int, ...]
    score: float


def beam_search(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    beams: Beams | None = None,
    max_tokens: int = 100,
    stop_tokens: Iterable[int] = (),
    batch_size: int = 8,
) -> list[list[Hypothesis]]:
    """The best answers to each prompt, best first: `beams.num_return` of them.

    prompts: each text, token ids or chat messages.  max_tokens: of an answer, default 100; it also ends where the
    model's context does.  stop_tokens: further ids that end an answer, beside the tokenizer's own.
    batch_size: prompts that an encoder-decoder answers at once, those of like length together.

    Raises PromptError for an empty prompt or one that fills the context, SamplingError for bad options and
    UnsupportedModelError for a model that can't generate.
    """
    if isinstance(prompts, str):
        raise UsageError("prompts is one string; give a list of them")
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} is {value}, but must be at least 1")
    beams = Beams() if beams is None else beams
    check_generates(model)
    rows = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    for row in rows:
        check_ids(model, row)
    limits = [room(model, row, max_tokens) for row in rows]
    stops = frozenset(tokenizer.stop_ids) | frozenset(stop_tokens)
    words = min(tokenizer.vocab_size, model.config.embeddings.vocab_size)
    found: list[list[Hypothesis]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    size = batch_size if model.config.has_memory else 1
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        searches = search(
            model, [rows[i] for i in batch], beams, stops=stops, limits=[limits[i] for i in batch], words=words
        )
        for index, done in zip(batch, searches, strict=True):
            found[index] = [
                Hypothesis(text=tokenizer.decode(t for t in answer if t not in stops), tokens=answer, score=score)
                for score, answer in done[: beams.num_return]
            ]
    return found


def search(
    model: Transformer,
    rows: Sequence[Sequence[int]],
    beams: Beams,
    *,
    stops: frozenset[int],
    limits: Sequence[int],
    words: int,
) -> list[list[tuple[float, tuple[int, ...]]]]:
    """Score and ids of the finished answers to each of B prompts, best first.

    rows: B prompts, more than one with an encoder-decoder only.  limits: most tokens of each answer.  words: ids
    from that one on are never chosen.
    """
    steps = make_steps(model)
    searches = [_Search(beams, stops, limit) for limit in limits]
    active = list(range(len(rows)))
    width = max(2, 1 + len(stops)) * beams.num_beams
    logits = steps.start(rows)  # one row a prompt: all beams of a prompt are the same so far
    while True:
        candidates = _best(logits, [searches[i] for i in active], width, words)
        origins, tokens, left = [], [], []
        per_prompt = logits.shape[0] // len(active)
        for place, index in enumerate(active):
            chosen = searches[index].advance(*candidates[place])
            if not searches[index].done:
                left.append(index)
                origins += [place * per_prompt + beam for beam, _ in chosen]
                tokens += [token for _, token in chosen]
        if not left:
            return [one.finished for one in searches]
        active = left
        steps.take(origins)
        logits = steps.step(mx.array(tokens))


def _best(
    logits: mx.array, searches: Sequence[_Search], width: int, words: int
) -> list[tuple[list[float], list[int], list[int]]]:
    """For each search the `width` best continuations: joint log probabilities, beams and tokens, best first."""
    logits = logits.astype(mx.float32)
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    scores = scores[:, :words] + mx.array([score for one in searches for score in one.scores])[:, None]
    flat = scores.reshape(len(searches), -1)
    width = min(width, flat.shape[1])
    places = mx.argpartition(-flat, width - 1, axis=-1)[:, :width]
    best = np.array(mx.take_along_axis(flat, places, axis=-1)), np.array(places)
    if np.isnan(best[0]).any():
        raise broken_logits()
    result = []
    for values, at in zip(*best, strict=True):
        order = np.argsort(-values, kind="stable")
        values, at = values[order], at[order]
        result.append((values.tolist(), (at // words).tolist(), (at % words).tolist()))
    return result


@dataclass
class _Search:
    """The beams of one prompt.

    scores: joint log probabilities of the unfinished answers, best first; one empty answer at the beginning.
    answers: their tokens.  finished: score and tokens of the finished ones, best first, at most num_beams.
    """

    beams: Beams
    stops: frozenset[int]
    limit: int
    scores: list[float] = field(default_factory=lambda: [0.0])
    answers: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    finished: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    done: bool = False

    def advance(self, values: list[float], origins: list[int], tokens: list[int]) -> list[tuple[int, int]]:
        """Go on from the best continuations; beam and token of each answer that stays unfinished."""
        num_beams = self.beams.num_beams
        length = len(self.answers[0]) + 1
        chosen, scores, answers = [], [], []
        for rank, (value, beam, token) in enumerate(zip(values, origins, tokens, strict=True)):
            answer = (*self.answers[beam], token)
            if token in self.stops or length == self.limit:
                # Only what is among the best num_beams may end; the others were looked at to have enough to go on.
                if rank < num_beams:
                    self.finished.append((value / length**self.beams.length_penalty, answer))
            elif len(chosen) < num_beams:
                chosen.append((beam, token))
                scores.append(value)
                answers.append(answer)
        self.finished.sort(key=lambda one: -one[0])
        del self.finished[num_beams:]
        self.scores, self.answers = scores, answers
        self.done = length == self.limit or not chosen or self._settled(length)
        return chosen

    def _settled(self, length: int) -> bool:
        """Whether nothing unfinished may yet replace a finished answer."""
        if len(self.finished) < self.beams.num_beams:
            return False
        if self.beams.early_stopping is True:
            return True
        penalty = self.beams.length_penalty
        reach = self.limit if self.beams.early_stopping == "never" and penalty > 0 else length
        return self.scores[0] / reach**penalty <= self.finished[-1][0]
