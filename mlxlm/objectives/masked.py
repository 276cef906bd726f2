"""Masked language modelling (Devlin et al. 2018, arXiv:1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxlm.data.batch import IGNORE, Batch
from mlxlm.errors import TokenizerError, UsageError
from mlxlm.objectives.objective import Row
from mlxlm.objectives.rows import joined, lengths, pad, pad_targets, padded_length
from mlxlm.objectives.words import unusable, word_starts

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer


def choose_tokens(maskable: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the maskable tokens (n,), bool (n,); all sets of that size are equally likely."""
    chosen = np.zeros(len(maskable), dtype=bool)
    chosen[rng.choice(np.flatnonzero(maskable), count, replace=False)] = True
    return chosen


def choose_words(maskable: np.ndarray, starts: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Whole words of at most `count` tokens together, in random order until no other fits, bool (n,).

    maskable, starts: bool (n,).  starts: where words begin. A word ends where the next begins or a token can't be
    masked. When every word is longer than `count`, the first `count` tokens of one are chosen.
    """
    after_gap = np.concatenate([[True], ~maskable[:-1]])
    number = np.cumsum(starts | after_gap | ~maskable)
    words = [np.flatnonzero((number == word) & maskable) for word in np.unique(number[maskable])]
    chosen, left = np.zeros(len(maskable), dtype=bool), count
    order = rng.permutation(len(words))
    for index in order:
        if len(words[index]) <= left:
            chosen[words[index]] = True
            left -= len(words[index])
    if left == count and len(words):
        chosen[words[order[0]][:count]] = True
    return chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedLM:
    """15% of the tokens are predicted; of them 80% are masked, 10% replaced by random ones, 10% left as they are.

    A row is one document between cls_id and sep_id; with next_sentence it is cut in two, each followed by sep_id, and
    in half of the rows the second part comes from another row of the batch.
    Batch: tokens, targets, key_lengths; with next_sentence token_types and next_sentence_labels (0: it is the next).

    mask_id, cls_id, sep_id, pad_id: special ids.  words: ids that random tokens are drawn from (W,).
    starts: which ids begin a word (V,), given to mask whole words.
    rate: share of the non-special tokens that is predicted, at least one, default 0.15.
    masked, replaced: shares of those, default 0.8 and 0.1.  next_sentence: default False.
    """

    mask_id: int
    cls_id: int
    sep_id: int
    words: np.ndarray = field(repr=False)
    pad_id: int = 0
    starts: np.ndarray | None = field(default=None, repr=False)
    rate: float = 0.15
    masked: float = 0.8
    replaced: float = 0.1
    next_sentence: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0 or min(self.masked, self.replaced) < 0 or self.masked + self.replaced > 1:
            raise UsageError(
                f"rate {self.rate}, masked {self.masked}, replaced {self.replaced}; expected 0 < rate <= 1 and two "
                "shares of at most 1 together"
            )

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, *, whole_words: bool = False, **settings: Any) -> MaskedLM:
        """With the tokenizer's special tokens; bos and eos frame a text where there are no cls and sep.

        Raises TokenizerError for a tokenizer without a mask or framing tokens, or with whole_words without words.
        """
        cls_id = tokenizer.cls_id if tokenizer.cls_id is not None else tokenizer.bos_id
        sep_id = tokenizer.sep_id if tokenizer.sep_id is not None else tokenizer.eos_id
        ids = {"mask": tokenizer.mask_id, "cls or bos": cls_id, "sep or eos": sep_id}
        missing = [name for name, value in ids.items() if value is None]
        if missing:
            raise TokenizerError(f"masked language modelling needs a tokenizer with tokens {', '.join(missing)}")
        never = unusable(tokenizer)
        return cls(
            mask_id=tokenizer.mask_id,
            cls_id=cls_id,
            sep_id=sep_id,
            pad_id=tokenizer.pad_id or 0,
            words=np.array([id for id in range(tokenizer.vocab_size) if id not in never], dtype=np.int32),
            starts=word_starts(tokenizer) if whole_words else None,
            **settings,
        )

    @property
    def packs(self) -> bool:
        """A row is one document."""
        return False

    def row_length(self, max_length: int) -> int:
        """What the special tokens around the text leave."""
        return max_length - (3 if self.next_sentence else 2)

    def batch(self, rows: list[Row], rng: np.random.Generator, max_length: int) -> Batch:
        """tokens, targets (B, L), key_lengths (B,), and with next_sentence token_types (B, L), labels (B,).

        A row of one token, or one alone in its batch, has its own second part: a following one.
        """
        texts = [joined(row, self.row_length(max_length), drop=self.sep_id) for row in rows]
        framed, types, labels = [], [], []
        for index in range(len(texts)):
            text, kinds, label = self._pair(texts, index, rng) if self.next_sentence else self._single(texts[index])
            framed.append(text)
            types.append(kinds)
            labels.append(label)
        corrupted = [self.corrupt(text, rng) for text in framed]
        length = padded_length(max(map(len, framed)), max_length)
        batch = {
            "tokens": pad([tokens for tokens, _ in corrupted], length, self.pad_id),
            "targets": pad_targets([targets for _, targets in corrupted], length),
            "key_lengths": lengths(framed),
        }
        if self.next_sentence:
            batch |= {
                "token_types": pad(types, length, 0),
                "next_sentence_labels": np.array(labels, dtype=np.int32),
            }
        return batch

    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Corrupted tokens (n,) and targets (n,) of a framed text (n,); ids that are not `words` stay as they are."""
        maskable = np.isin(tokens, self.words)
        targets = np.full(len(tokens), IGNORE, dtype=np.int32)
        if not maskable.any():
            return tokens, targets
        count = max(1, round(self.rate * int(maskable.sum())))
        if self.starts is None:
            chosen = choose_tokens(maskable, count, rng)
        else:
            chosen = choose_words(maskable, self.starts[tokens], count, rng)
        targets[chosen] = tokens[chosen]
        draw = rng.random(len(tokens))
        random = self.words[rng.integers(0, len(self.words), len(tokens))]
        out = np.where(chosen & (draw < self.masked), self.mask_id, tokens)
        out = np.where(chosen & (draw >= self.masked) & (draw < self.masked + self.replaced), random, out)
        return out.astype(np.int32), targets

    def _single(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        framed = np.concatenate([[self.cls_id], text, [self.sep_id]])
        return framed, np.zeros(len(framed), dtype=np.int32), 0

    def _pair(
        self, texts: list[np.ndarray], index: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Framed tokens, token types and label of a row: its first part, and its second or one from another row."""
        text = texts[index]
        cut = int(rng.integers(1, len(text))) if len(text) > 1 else 1
        first, second, label = text[:cut], text[cut:], 0
        if len(texts) > 1 and len(second) and rng.random() < 0.5:
            other = texts[(index + int(rng.integers(1, len(texts)))) % len(texts)]
            start = int(rng.integers(0, max(len(other) - len(second), 0) + 1))
            second, label = other[start : start + len(second)], 1
        framed = np.concatenate([[self.cls_id], first, [self.sep_id], second, [self.sep_id]])
        return framed, (np.arange(len(framed)) >= len(first) + 2).astype(np.int32), label
