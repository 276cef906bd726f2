"""Span corruption and text-to-text: what encoder-decoder models learn from (Raffel et al. 2019, arXiv:1910.10683)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from mlxlm.data.batch import Batch
from mlxlm.errors import TokenizerError, UsageError
from mlxlm.objectives.objective import Row
from mlxlm.objectives.rows import joined, lengths, pad, pad_targets, padded_length
from mlxlm.objectives.spans import noise_mask, raw_length, spans_of

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer


def find_sentinels(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of <extra_id_0>, <extra_id_1> ..., which stand at the top of the vocabulary, from the last id down.

    Raises TokenizerError when the vocabulary has none.
    """
    named = (tokenizer.token_id(f"<extra_id_{number}>") for number in range(tokenizer.vocab_size))
    sentinels = tuple(takewhile(lambda id: id is not None, named))
    if not sentinels:
        raise TokenizerError("this tokenizer has no sentinels; expected tokens <extra_id_0>, <extra_id_1> ...")
    return sentinels  # type: ignore[return-value]


def replace_spans(tokens: np.ndarray, hidden: np.ndarray, sentinels: Sequence[int]) -> np.ndarray:
    """tokens (n,) with each run of `hidden` (n,) replaced by one sentinel, in order."""
    out, last = [], 0
    for (start, stop), sentinel in zip(spans_of(hidden), sentinels, strict=False):
        out += [tokens[last:start], [sentinel]]
        last = stop
    return np.concatenate([*out, tokens[last:]]).astype(np.int32)


def corrupt_spans(
    tokens: np.ndarray, hidden: np.ndarray, sentinels: Sequence[int], eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Input and target of a text (n,) of which the tokens `hidden` (n,) are noise; both end with eos_id.

    Raises UsageError when there are more spans than sentinels.
    """
    runs = max(len(spans_of(hidden)), len(spans_of(~hidden)))
    if runs > len(sentinels):
        raise UsageError(
            f"a text has {runs} spans but the tokenizer only {len(sentinels)} sentinels; "
            "use a shorter max_length, longer spans or less noise"
        )
    end = np.array([eos_id], dtype=np.int32)
    return (
        np.concatenate([replace_spans(tokens, hidden, sentinels), end]),
        np.concatenate([replace_spans(tokens, ~hidden, sentinels), end]),
    )


def seq2seq_batch(
    sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], start_id: int, pad_id: int, limits: tuple[int, int]
) -> Batch:
    """tokens (B, S), key_lengths (B,), targets (B, L) and decoder_tokens (B, L): the targets behind start_id.

    limits: most columns of the encoder and of the decoder.
    """
    inputs = [np.concatenate([[start_id], target[:-1]]) for target in targets]
    encoder = padded_length(max(map(len, sources)), limits[0])
    decoder = padded_length(max(map(len, targets)), limits[1])
    return {
        "tokens": pad(sources, encoder, pad_id),
        "key_lengths": lengths(sources),
        "decoder_tokens": pad(inputs, decoder, pad_id),
        "targets": pad_targets(targets, decoder),
    }


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Spans of a text are replaced by sentinels; the decoder writes each sentinel and what it stands for.

    Documents follow each other in a row without marks. Batch: tokens, key_lengths, decoder_tokens, targets.

    sentinels: ids, the first for the first span.  eos_id: ends input and target.  pad_id: fills rows.
    start_id: the decoder's first token.  density: share of the tokens that is hidden, default 0.15.
    mean_span: mean length of a hidden span, default 3.
    """

    sentinels: tuple[int, ...]
    eos_id: int
    pad_id: int = 0
    start_id: int = 0
    density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not 0.0 < self.density < 1.0 or self.mean_span < 1.0:
            raise UsageError(
                f"density {self.density}, mean_span {self.mean_span}; expected 0 < density < 1 and mean_span >= 1"
            )

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, **settings: float) -> SpanCorruption:
        """With the tokenizer's sentinels, end and padding; decoders start with padding unless start_id says else.

        Raises TokenizerError for a tokenizer without one of them.
        """
        for role in ("eos", "pad"):
            if getattr(tokenizer, f"{role}_id") is None:
                raise TokenizerError(f"span corruption needs a tokenizer with a {role} token")
        ids = {"pad_id": tokenizer.pad_id, "start_id": tokenizer.pad_id}
        return cls(sentinels=find_sentinels(tokenizer), eos_id=tokenizer.eos_id, **{**ids, **settings})

    @property
    def packs(self) -> bool:
        """Several documents share a row."""
        return True

    def row_length(self, max_length: int) -> int:
        """Raw tokens whose corrupted input has at most max_length tokens, 568 for 512."""
        return raw_length(max_length, self.density, self.mean_span)[0]

    def target_length(self, max_length: int) -> int:
        """Tokens of the decoder for an encoder of max_length, 114 for 512."""
        return raw_length(max_length, self.density, self.mean_span)[1]

    def batch(self, rows: list[Row], rng: np.random.Generator, max_length: int) -> Batch:
        """tokens (B, S), key_lengths (B,), decoder_tokens and targets (B, L). A text of one token hides nothing."""
        raw, target_length = raw_length(max_length, self.density, self.mean_span)
        sources, targets = [], []
        for row in rows:
            text = joined(row, raw, drop=self.eos_id)
            hidden = noise_mask(len(text), self.density, self.mean_span, rng)
            source, target = corrupt_spans(text, hidden, self.sentinels, self.eos_id)
            sources.append(source)
            targets.append(target if hidden.any() else target[:0])
        return seq2seq_batch(sources, targets, self.start_id, self.pad_id, (max_length, max(target_length, 1)))


@dataclass(frozen=True, kw_only=True)
class TextToText:
    """Many tasks in one model: a source text, with its task in front, and a target text (Raffel et al. 2019, 2.4).

    A row is two pieces, source and target. Batch: tokens, key_lengths, decoder_tokens, targets.

    eos_id: ends both, unless it is there already.  pad_id: fills rows.  start_id: the decoder's first token.
    max_target_length: of the decoder, None as long as the encoder. Texts that are too long are cut before their end.
    """

    eos_id: int
    pad_id: int = 0
    start_id: int = 0
    max_target_length: int | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, **settings: int) -> TextToText:
        """With the tokenizer's end and padding. Raises TokenizerError for a tokenizer without one of them."""
        for role in ("eos", "pad"):
            if getattr(tokenizer, f"{role}_id") is None:
                raise TokenizerError(f"text-to-text needs a tokenizer with a {role} token")
        ids = {"pad_id": tokenizer.pad_id, "start_id": tokenizer.pad_id}
        return cls(eos_id=tokenizer.eos_id, **{**ids, **settings})

    @property
    def packs(self) -> bool:
        """A row is one example."""
        return False

    def row_length(self, max_length: int) -> int:
        """Most tokens of a source and of a target together."""
        return max_length + (self.max_target_length or max_length)

    def batch(self, rows: list[Row], rng: np.random.Generator, max_length: int) -> Batch:
        """tokens (B, S), key_lengths (B,), decoder_tokens and targets (B, L). Uses no chance."""
        limits = max_length, self.max_target_length or max_length
        for row in rows:
            if len(row) != 2:
                raise UsageError(f"a row of text-to-text is a source and a target, not {len(row)} pieces")
        sources = [self._ended(row[0], limits[0]) for row in rows]
        targets = [self._ended(row[1], limits[1]) for row in rows]
        return seq2seq_batch(sources, targets, self.start_id, self.pad_id, limits)

    def _ended(self, tokens: np.ndarray, limit: int) -> np.ndarray:
        text = np.asarray(tokens, dtype=np.int32)
        text = text[:-1] if len(text) and text[-1] == self.eos_id else text
        return np.concatenate([text[: limit - 1], [self.eos_id]]).astype(np.int32)


def mixing_rates(sizes: Sequence[int], limit: int = 2**19, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of tasks by their numbers of examples (Raffel et al. 2019, section 3.5.2).

    Proportional to min(size, limit) ** (1 / temperature): 1 is examples-proportional mixing, large is equal mixing.
    """
    if temperature <= 0 or limit < 1 or not sizes or min(sizes) < 1:
        raise UsageError("mixing needs tasks with examples, a limit of at least 1 and a positive temperature")
    rates = np.minimum(np.array(sizes, dtype=np.float64), limit) ** (1.0 / temperature)
    return rates / rates.sum()
