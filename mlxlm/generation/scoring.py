"""How probable a language model finds given tokens: the ground of perplexity, multiple choice and lm_eval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxlm.data import IGNORE, Example, pad_examples
from mlxlm.errors import PromptError, UsageError
from mlxlm.generation.sampling import broken_logits
from mlxlm.generation.steps import check_ids

if TYPE_CHECKING:
    from mlxlm.models import Transformer

_LOGIT_BYTES = 64 * 1024**2  # of float32 logits that exist at once


@dataclass(frozen=True)
class Score:
    """What a model thinks of the targets of one example.

    log_probability: sum over them, natural logarithm.  count: of them.  greedy: whether each is the likeliest token.
    """

    log_probability: float
    count: int
    greedy: bool


Progress = Callable[[str, int, int], None]  # is told what is done, how much of it is, and of how much


def score_examples(
    model: Transformer,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    what: str = "texts to score",
    progress: Progress | None = None,
) -> list[Score]:
    """Scores of each example's targets, in the order given. Virtual tokens of an adapter stand before all of them.

    examples: what a model reads and which tokens are targets, as `mlxlm.data` has them.  batch_size: examples at once,
    of like length; it changes speed and memory, and results by rounding alone.  what, progress: told before each batch.

    Raises UsageError for a batch_size below 1, PromptError for ids and lengths that the model doesn't have,
    WeightsError when its logits are not numbers.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1")
    limit = context_limit(model)
    for example in examples:
        check_ids(model, [*example.tokens, *(example.target or ())])
        longest = max(len(example.tokens) - (example.target is None), len(example.target or ()))
        if limit is not None and longest > limit:
            where = f"{example.where}: " if example.where else ""
            raise PromptError(f"{where}the text has {longest} tokens, but the model's context is {limit}; shorten it")
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    scores: dict[int, Score] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        if progress is not None:
            progress(what, start, len(order))
        scores.update(zip(part, _score(model, [examples[index] for index in part]), strict=True))
    return [scores[index] for index in range(len(examples))]


def context_limit(model: Transformer) -> int | None:
    """Tokens that a model can read at once, those that an adapter puts before them left out; None for no limit."""
    table = model.config.embeddings.positions
    limit = getattr(table, "limit", None) or model.config.max_length
    return None if limit is None else limit - model.virtual_length


def cut_left(example: Example, limit: int) -> Example:
    """The example with the last tokens of its context alone, so that a model reads at most `limit` of them."""
    kept = limit + (example.target is None)  # the last token of a single stack is predicted and not read
    return replace(example, tokens=example.tokens[-kept:], scored=example.scored[-kept:])


def _score(model: Transformer, examples: list[Example]) -> list[Score]:
    """Of one batch. Logits are made of the places with targets alone, a few at a time."""
    batch = pad_examples(examples, max_length=2**31 - 1, multiple=8, decoder_start=model.config.decoder_start)
    targets = batch.pop("targets").reshape(-1)
    inputs = {name: mx.array(array) for name, array in batch.items()}
    hidden = model.hidden(inputs.pop("tokens"), **inputs)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    places = np.flatnonzero(targets != IGNORE)
    found = np.zeros(len(targets))
    likeliest = np.ones(len(targets), dtype=bool)
    step = max(1, _LOGIT_BYTES // (4 * model.config.embeddings.vocab_size))
    for start in range(0, len(places), step):
        part = places[start : start + step]
        logits = model.logits(hidden[mx.array(part)]).astype(mx.float32)
        wanted = mx.array(targets[part])
        own = mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        found[part] = np.array(own - mx.logsumexp(logits, axis=-1))
        likeliest[part] = np.array(own >= logits.max(axis=-1))
    if np.isnan(found).any():
        raise broken_logits()
    rows = targets.reshape(len(examples), -1) != IGNORE
    return [
        Score(math.fsum(own[valid]), int(valid.sum()), bool(greedy.all()))
        for own, greedy, valid in zip(found.reshape(rows.shape), likeliest.reshape(rows.shape), rows, strict=True)
    ]
