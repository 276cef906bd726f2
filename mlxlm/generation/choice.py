"""Multiple choice by likelihood: how probable a language model finds each answer to a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlxlm.data import Example
from mlxlm.errors import PromptError, UsageError, nearest
from mlxlm.generation.scoring import Score, score_examples
from mlxlm.generation.steps import check_generates

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
    check_generates(model)
    if not context:
        raise PromptError("the context is empty")
    for number, choice in enumerate(choices, 1):
        if not choice:
            raise PromptError(f"choice {number} is empty")
    sides = [answer_example(model, tokenizer, context, choice) for choice in choices]
    scores = score_examples(model, sides, batch_size=batch_size)
    return [normalized(*one, normalize) for one in zip(choices, sides, scores, strict=True)]


def normalized(text: str, example: Example, score: Score, normalize: Normalization) -> Likelihood:
    """The likelihood of one choice: its score by its number of tokens, or of UTF-8 bytes of its text, or as it is."""
    length = {"none": 1, "tokens": example.num_targets, "bytes": len(text.encode())}[normalize]
    total = score.log_probability
    return Likelihood(text=text, log_probability=total, num_tokens=example.num_targets, score=total / length)


def answer_example(model: Transformer, tokenizer: Tokenizer, context: str, answer: str) -> Example:
    """A context with an answer whose tokens are the targets, both of them not empty.

    Raises PromptError when nothing stands before the first token of the answer.
    """
    if model.config.has_memory:
        before = tokenizer.encode(context)
        return Example(before, [False] * len(before), target=tokenizer.encode(answer, add_special_tokens=False))
    whole = tokenizer.encode(context + answer)
    alone = tokenizer.encode(context)
    if whole[-1:] == alone[-1:] and whole[-1:] and whole[-1] in tokenizer.special_ids:
        whole, alone = whole[:-1], alone[:-1]  # a tokenizer that ends every text with a special token
    # A word may be cut otherwise where an answer follows; what differs then counts as part of the answer.
    limit = min(len(alone), len(whole) - 1)
    shared = next((i for i in range(limit) if alone[i] != whole[i]), limit)
    if shared == 0:
        raise PromptError("the context has no token of its own before the choice, so nothing predicts its first token")
    return Example(whole, [False] * shared + [True] * (len(whole) - shared))
