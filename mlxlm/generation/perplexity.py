"""Perplexity of texts: windows that slide over each of them, every token counted once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxlm.data import Example
from mlxlm.errors import PromptError, UnsupportedModelError, UsageError
from mlxlm.generation.scoring import Progress, context_limit, score_examples
from mlxlm.generation.steps import check_generates

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

LONGEST_WINDOW = 2048  # where the caller names none and the model could read more
_TEXTS = 64  # tokenized and scored together


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """loss: mean over tokens, natural logarithm.  tokens, bytes: counted; bytes of UTF-8.  texts: how many.
    window, stride: see `perplexity`.
    """

    loss: float
    tokens: int
    bytes: int
    texts: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(loss) of a token: comparable between models with the same tokenizer only."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of text: comparable between all models."""
        return self.loss * self.tokens / math.log(2) / self.bytes


def perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> TextScores:
    """How well a decoder predicts texts, each by itself.

    A window is what the model reads at once. The first begins with the start token; each next one ends `stride` tokens
    later, and of it only the tokens that no earlier one has predicted count, so each of them has at least
    window - stride tokens before it. The start token is the tokenizer's bos or else eos; where it has neither, the
    first token of a text is not predicted and neither it nor its bytes count.

    window: tokens, default the model's context and at most 2048.  stride: default half a window.  batch_size: windows
    at once. It changes speed and memory, and results by rounding alone.  progress: told before each batch.

    Raises UnsupportedModelError for a model that is no decoder, PromptError when no token is left to predict.
    """
    check_generates(model)
    if model.config.has_memory:
        raise UnsupportedModelError(
            "an encoder-decoder doesn't predict plain text; it is evaluated on rows with source and target"
        )
    limit = context_limit(model)
    if window is None:
        window = LONGEST_WINDOW if limit is None else min(limit, LONGEST_WINDOW)
    stride = max(window // 2, 1) if stride is None else stride
    if window < 1 or (limit is not None and window > limit):
        raise UsageError(f"the window is {window} tokens; expected at least 1 and at most the model's context, {limit}")
    if not 1 <= stride <= window:
        raise UsageError(f"the stride is {stride} tokens; expected 1 to the window's {window}")
    if isinstance(texts, str):
        raise UsageError("texts is one string; give a list of them")
    losses, tokens, size = [], 0, 0
    for first in range(0, len(texts), _TEXTS):
        examples: list[Example] = []
        for text in texts[first : first + _TEXTS]:
            ids, unread = _with_start(tokenizer, text)
            examples += windows(ids, window, stride)
            size += max(len(text.encode()) - unread, 0)
        what = f"windows of {window} tokens, of texts {first + 1} to {min(first + _TEXTS, len(texts))} of {len(texts)}"
        for score in score_examples(model, examples, batch_size=batch_size, what=what, progress=progress):
            losses.append(-score.log_probability)
            tokens += score.count
    if not tokens or not size:
        raise PromptError("the texts have no token to predict")
    return TextScores(
        loss=math.fsum(losses) / tokens, tokens=tokens, bytes=size, texts=len(texts), window=window, stride=stride
    )


def windows(ids: Sequence[int], window: int, stride: int) -> Iterator[Example]:
    """Examples of up to `window` tokens and the one after them, in which each token but the first is a target once."""
    done, last = 0, len(ids) - 1  # places of the last token that was predicted, and of the last one to predict
    while done < last:
        end = min(done + (stride if done else window), last)
        begin = max(end - window, 0)
        tokens = list(ids[begin : end + 1])
        yield Example(tokens, [place > done for place in range(begin, end + 1)])
        done = end


def start_token(tokenizer: Tokenizer) -> int | None:
    """The token before a text's first: bos, else eos, else none."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def _with_start(tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
    """Ids of a text behind the start token; and how many of its bytes no prediction is about."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = start_token(tokenizer)
    if start is not None:
        return [start, *ids], 0
    return ids, len(tokenizer.decode(ids[:1]).encode())
