"""Filling blanks of any length with models that were trained to do so (Du et al. 2021, arXiv:2103.10360)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.errors import PromptError, UnsupportedModelError, UsageError
from mlxlm.generation.decoding import sampling_of
from mlxlm.generation.sampler import Sampler
from mlxlm.generation.sampling import Sampling
from mlxlm.generation.steps import check_ids
from mlxlm.layers import Cache

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

# A blank for a few words, for a sentence, and for all that follows.
BLANKS = ("[MASK]", "[sMASK]", "[gMASK]")
_STARTS = ("<|startofpiece|>", "<sop>")
_ENDS = ("<|endofpiece|>", "<eop>")


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A text whose blanks are filled.  text: the whole of it.  blanks: what each blank was filled with, in order."""

    text: str
    blanks: tuple[str, ...]


def fill_blanks(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_tokens: int = 100,
    sampling: Sampling | None = None,
    **options: Any,
) -> Filled:
    """Fill the blanks [MASK], [sMASK] and [gMASK] of a text from left to right; each sees those filled before.

    max_tokens: of one blank, default 100.  sampling: see `Sampling`; or its fields as keywords.

    Raises PromptError without a blank or with too long a text, UnsupportedModelError when the model or tokenizer is
    not made for it.
    """
    sampling = sampling_of(sampling, options)
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}, but at least one token must be generated")
    if not model.config.fills_blanks:
        raise UnsupportedModelError("this model can't fill blanks: it has no positions for what goes into them")
    start, end = _named(tokenizer, _STARTS), _named(tokenizer, _ENDS)
    tokens = _framed(tokenizer, text)
    check_ids(model, tokens)
    blanks = {number for name in BLANKS if (number := tokenizer.token_id(name)) is not None}
    places = [place for place, token in enumerate(tokens) if token in blanks]
    if not places:
        raise PromptError(f"the text has no blank; put one of {', '.join(BLANKS)} where something is to be filled in")
    limit = model.config.max_length
    if limit is not None and len(tokens) > limit:
        raise PromptError(f"the text has {len(tokens)} tokens, but the model's context is {limit}; shorten it")
    stops = {end} if tokenizer.eos_id is None else {end, tokenizer.eos_id}
    cache = model.make_cache()
    model.hidden(mx.array([tokens]), prefix_lengths=mx.array([len(tokens)]), cache=cache)
    words = min(tokenizer.vocab_size, model.config.embeddings.vocab_size)
    sampler = sampling.sampler(tokens, words)
    length = max_tokens if limit is None else min(max_tokens, limit)
    fills = {place: _fill(model, cache, sampler, place, start, stops, length) for place in places}
    return Filled(
        text=_joined(tokenizer, tokens, fills),
        blanks=tuple(tokenizer.decode(fill).strip() for fill in fills.values()),
    )


def _named(tokenizer: Tokenizer, names: tuple[str, ...]) -> int:
    for name in names:
        number = tokenizer.token_id(name)
        if number is not None:
            return number
    raise UnsupportedModelError(f"this tokenizer can't mark what fills a blank: it has no token {' or '.join(names)}")


def _framed(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the text between the tokens that begin and end a text, as the models were trained."""
    if not text:
        raise PromptError("the text is empty")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    before = [] if tokenizer.cls_id is None or tokens[:1] == [tokenizer.cls_id] else [tokenizer.cls_id]
    after = [] if tokenizer.eos_id is None or tokens[-1:] == [tokenizer.eos_id] else [tokenizer.eos_id]
    return before + tokens + after


def _fill(
    model: Transformer, cache: Cache, sampler: Sampler, place: int, start: int, stops: set[int], length: int
) -> list[int]:
    """Up to `length` tokens for the blank at `place`; all stand at its position, and count their own place in it."""
    fill: list[int] = []
    token = start
    while len(fill) < length:
        hidden = model.hidden(
            mx.array([[token]]), positions=mx.array([[place]]), blocks=mx.array([[len(fill) + 1]]), cache=cache
        )
        token = int(sampler(model.logits(hidden[:, -1])).item())
        if token in stops:
            break
        fill.append(token)
    return fill


def _joined(tokenizer: Tokenizer, tokens: list[int], fills: dict[int, list[int]]) -> str:
    whole: list[int] = []
    for place, token in enumerate(tokens):
        whole += fills.get(place, [token])
    return tokenizer.decode(whole)
