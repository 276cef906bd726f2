"""Multiple choice by likelihood: how probable a language model finds each answer to a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from mlxlm.errors import PromptError, UsageError, nearest
from mlxlm.generation.steps import check_generates, check_ids, pad

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

NORMALIZATIONS = ("none", "tokens", "bytes")
Normalization = Literal["none", "tokens", "bytes"]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What a model thinks of one choice.

    text: of it.  log_probability: natural logarithm of its probability after the context.  num_tokens: it has.
    score: the log probability, by length where that was asked for; the choice with the highest one is the answer.
    """

    text: str
    log_probability: float
    num_tokens: int
    score: float


def likelihoods(
    model: Transformer,
    tokenizer: Tokenizer,
    context: str,
    choices: Sequence[str],
    *,
    normalize: Normalization = "none",
    batch_size: int = 16,
) -> list[Likelihood]:
    """The likelihood of each choice after `context`, in the order given; `max(..., key=lambda c: c.score)` answers.

    A decoder reads context and choice as one text, so a choice usually begins with a space; an encoder-decoder reads
    the context with its encoder.  normalize: divide the log probability by the number of "tokens" or of UTF-8 "bytes"
    of the choice, which takes the handicap from long ones (Brown et al. 2020, arXiv:2005.14165, section 2.4; Gao
    2021); default "none".  batch_size: choices at once.

    Raises PromptError for an empty context or choice or a text longer than the model's context.
    """
    if normalize not in NORMALIZATIONS:
        raise UsageError(f"unknown normalization {normalize!r}{nearest(normalize, NORMALIZATIONS)}")
    if isinstance(choices, str) or not choices:
        raise UsageError("choices is a list of at least one text")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1")
    check_generates(model)
    if not context:
        raise PromptError("the context is empty")
    for number, choice in enumerate(choices, 1):
        if not choice:
            raise PromptError(f"choice {number} is empty")
    sides = [_split(model, tokenizer, context, choice) for choice in choices]
    for before, answer in sides:
        check_ids(model, [*before, *answer])
        _check_length(model, before, answer)
    sums: list[float] = []
    for first in range(0, len(sides), batch_size):
        sums += _log_probabilities(model, sides[first : first + batch_size])
    result = []
    for choice, (_, answer), total in zip(choices, sides, sums, strict=True):
        length = {"none": 1, "tokens": len(answer), "bytes": len(choice.encode())}[normalize]
        result.append(Likelihood(text=choice, log_probability=total, num_tokens=len(answer), score=total / length))
    return result


def _split(model: Transformer, tokenizer: Tokenizer, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Token ids before the choice and of the choice."""
    if model.config.has_memory:
        return tokenizer.encode(context), tokenizer.encode(choice, add_special_tokens=False)
    whole = tokenizer.encode(context + choice)
    alone = tokenizer.encode(context)
    if whole[-1:] == alone[-1:] and whole[-1:] and whole[-1] in tokenizer.special_ids:
        whole, alone = whole[:-1], alone[:-1]  # a tokenizer that ends every text with a special token
    # A word may be cut otherwise where a choice follows; what differs then counts as part of the choice.
    limit = min(len(alone), len(whole) - 1)
    shared = next((i for i in range(limit) if alone[i] != whole[i]), limit)
    if shared == 0:
        raise PromptError("the context has no token of its own before the choice, so nothing predicts its first token")
    return whole[:shared], whole[shared:]


def _check_length(model: Transformer, before: list[int], answer: list[int]) -> None:
    limit = model.config.max_length
    longest = max(len(before), len(answer)) if model.config.has_memory else len(before) + len(answer)
    if limit is not None and longest > limit:
        raise PromptError(f"context and choice have {longest} tokens, but the model's context is {limit}; shorten them")


def _log_probabilities(model: Transformer, sides: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Of each answer as a whole. Logits are made of the answers' positions only, one answer at a time."""
    if model.config.has_memory:
        sources, lengths = pad([before for before, _ in sides])
        inputs, _ = pad([[model.config.decoder_start, *answer[:-1]] for _, answer in sides])
        hidden = model.hidden(sources, decoder_tokens=inputs, key_lengths=lengths)
        starts = [0] * len(sides)
    else:
        tokens, lengths = pad([[*before, *answer[:-1]] for before, answer in sides])
        hidden = model.hidden(tokens, key_lengths=lengths)
        starts = [len(before) - 1 for before, _ in sides]
    sums = []
    for row, start, (_, answer) in zip(hidden, starts, sides, strict=True):
        logits = model.logits(row[None, start : start + len(answer)])[0].astype(mx.float32)
        chosen = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
        sums.append((chosen - mx.logsumexp(logits, axis=-1)).sum())
    return mx.stack(sums).tolist()  # type: ignore[return-value]
