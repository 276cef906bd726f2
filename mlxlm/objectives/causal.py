"""Causal and prefix language modelling: each token is predicted from those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlxlm.data.batch import IGNORE, Batch
from mlxlm.errors import UsageError
from mlxlm.objectives.objective import Row
from mlxlm.objectives.rows import joined, lengths, pad, pad_targets, padded_length

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """The next token of packed documents (Radford et al. 2019; packing without seeing other documents).

    Batch: tokens, targets, and with document_mask segments (documents are 1, 2, 3 ..., padding 0) and positions,
    which begin at 0 with each document. The last token of a document predicts nothing.

    document_mask: documents do not see each other, default True; without it they do, and positions run on.
    packed: several documents share a row, default True.  pad_id: fills rows, default 0; never predicted.
    """

    document_mask: bool = True
    packed: bool = True
    pad_id: int = 0

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, **settings: bool) -> CausalLM:
        """With the tokenizer's padding id, 0 where it has none."""
        return cls(pad_id=tokenizer.pad_id or 0, **settings)

    @property
    def packs(self) -> bool:
        """Whether several documents share a row."""
        return self.packed

    def row_length(self, max_length: int) -> int:
        """One more than the columns: the last raw token is only predicted."""
        return max_length + 1

    def batch(self, rows: list[Row], rng: np.random.Generator, max_length: int) -> Batch:
        """tokens, targets (B, L), and segments, positions (B, L) with document_mask. Uses no chance."""
        texts, targets, segments, positions = [], [], [], []
        for row in rows:
            text = joined(row, self.row_length(max_length))
            sizes = [len(piece) for piece in row]
            number = np.repeat(np.arange(1, len(row) + 1), sizes)
            place = np.concatenate([np.arange(size) for size in sizes])
            kept = max(len(text) - 1, 1)
            inside = number[1:] == number[:-1]
            texts.append(text[:kept])
            targets.append(np.where(inside, text[1:], IGNORE))
            segments.append(number[:kept])
            positions.append(place[:kept])
        length = padded_length(max(map(len, texts)), max_length)
        batch = {"tokens": pad(texts, length, self.pad_id), "targets": pad_targets(targets, length)}
        if self.document_mask:
            batch |= {"segments": pad(segments, length, 0), "positions": pad(positions, length, 0)}
        return batch


@dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """The rest of a text from a prefix that sees itself in both directions (Raffel et al. 2019, section 3.2.1).

    Batch: tokens, targets, prefix_lengths. Only the rest is predicted, its first token by the prefix's last.

    min_prefix, max_prefix: bounds of the prefix as a share of the text, drawn uniformly, default 0 and 1; at least
    one token is in the prefix and one in the rest.  pad_id: fills rows, default 0.
    """

    min_prefix: float = 0.0
    max_prefix: float = 1.0
    pad_id: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_prefix <= self.max_prefix <= 1.0:
            raise UsageError(f"prefixes from {self.min_prefix} to {self.max_prefix}; expected 0 <= min <= max <= 1")

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, **settings: float) -> PrefixLM:
        """With the tokenizer's padding id, 0 where it has none."""
        return cls(pad_id=tokenizer.pad_id or 0, **settings)

    @property
    def packs(self) -> bool:
        """A prefix belongs to a whole row, so a row is one document."""
        return False

    def row_length(self, max_length: int) -> int:
        """One more than the columns: the last raw token is only predicted."""
        return max_length + 1

    def batch(self, rows: list[Row], rng: np.random.Generator, max_length: int) -> Batch:
        """tokens, targets (B, L), prefix_lengths (B,). A single token is all prefix and predicts nothing."""
        texts, targets, prefixes = [], [], []
        for row in rows:
            text = joined(row, self.row_length(max_length))
            low = max(1, round(self.min_prefix * len(text)))
            high = max(low, min(round(self.max_prefix * len(text)), len(text) - 1))
            prefix = min(int(rng.integers(low, high + 1)), max(len(text) - 1, 1))
            places = np.arange(1, len(text))
            texts.append(text[: max(len(text) - 1, 1)])
            targets.append(np.where(places >= prefix, text[1:], IGNORE))
            prefixes.append(np.arange(prefix))
        length = padded_length(max(map(len, texts)), max_length)
        return {
            "tokens": pad(texts, length, self.pad_id),
            "targets": pad_targets(targets, length),
            "prefix_lengths": lengths(prefixes),
        }
