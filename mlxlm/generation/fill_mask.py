"""Filling masks with a masked language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxlm.errors import PromptError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A word for a mask.

    token: its id.  word: its text.  score: its probability.  text: the whole text with this word in this mask.
    """

    token: int
    word: str
    score: float
    text: str


def fill_mask(model: Transformer, tokenizer: Tokenizer, text: str, *, top_k: int = 5) -> list[list[Candidate]]:
    """The likeliest words for each mask in `text`, best first: one list a mask, in order.

    text: contains the tokenizer's mask token, or "[MASK]" which stands for it; with several, each is filled with the
    others left masked.  top_k: words a mask, default 5.

    Raises PromptError without a mask or with too long a text, UnsupportedModelError when the model or tokenizer has
    none, UsageError for a bad top_k.
    """
    mask_id = tokenizer.mask_id
    if mask_id is None or model.config.decoder is not None or not model.config.predicts_words:
        raise UnsupportedModelError("this model can't fill masks: it is no masked language model with a mask token")
    rows = min(tokenizer.vocab_size, model.config.embeddings.vocab_size)
    if not 1 <= top_k <= rows:
        raise UsageError(f"top_k is {top_k}, but must be between 1 and {rows}")
    mask = tokenizer.token(mask_id)
    tokens = tokenizer.encode(text.replace("[MASK]", mask))
    places = [place for place, token in enumerate(tokens) if token == mask_id]
    if not places:
        raise PromptError(f"the text has no mask; put {mask} where a word is to be filled in")
    limit = model.config.max_length
    if limit is not None and len(tokens) > limit:
        raise PromptError(f"the text has {len(tokens)} tokens, but the model's context is {limit}; shorten it")
    hidden = model.hidden(mx.array([tokens]))
    logits = model.logits(hidden[:, mx.array(places)])[0, :, :rows].astype(mx.float32)
    probabilities = mx.softmax(logits, axis=-1, precise=True)
    best = mx.argsort(-probabilities, axis=-1)[:, :top_k]
    scores = mx.take_along_axis(probabilities, best, axis=-1)
    return [
        [
            Candidate(
                token=token,
                word=tokenizer.decode([token]).strip(),
                score=score,
                text=_filled(tokenizer, tokens, place, token),
            )
            for token, score in zip(words, row, strict=True)
        ]
        for place, words, row in zip(places, best.tolist(), scores.tolist(), strict=True)
    ]


def _filled(tokenizer: Tokenizer, tokens: list[int], place: int, token: int) -> str:
    """The text with one mask filled; other masks stay visible, other special tokens don't."""
    filled = [*tokens[:place], token, *tokens[place + 1 :]]
    kept = [t for t in filled if t == tokenizer.mask_id or t not in tokenizer.special_ids or t == token]
    return tokenizer.decode(kept, skip_special_tokens=False)
