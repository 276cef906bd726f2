"""Blank infilling: spans are cut out of a text and written again, one token after the other, behind it (Du et al. 2021,
arXiv:2103.10360).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxlm.data.batch import IGNORE, Batch
from mlxlm.errors import TokenizerError, UsageError
from mlxlm.objectives.objective import Row
from mlxlm.objectives.rows import joined, lengths, pad, pad_targets, padded_length
from mlxlm.objectives.spans import Span, place_spans, poisson_weights
from mlxlm.objectives.words import sentence_ends

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer

MODES = ("token", "sentence", "generation")
# The names of a token: the published one, then how others write it.
_NAMES = {
    "mask_id": ("[MASK]",),
    "sentence_id": ("[sMASK]",),
    "generation_id": ("[gMASK]",),
    "start_id": ("<|startofpiece|>", "<sop>", "sop"),
    "end_id": ("<|endofpiece|>", "<eop>", "eop"),
}
_BLOCKED = "[dBLOCK]"


class Infilling(NamedTuple):
    """A text with blanks (Part A) and what fills them (Part B), all (n,): one after the other.

    prefix: tokens of Part A.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    blocks: np.ndarray
    prefix: int


def fill_in(
    tokens: np.ndarray, spans: list[Span], order: np.ndarray, blank_id: int, start_id: int, end_id: int
) -> Infilling:
    """Cut the spans out of a text (n,), each for one blank, and append them in `order`.

    Part A has the positions 0, 1, 2 ... of the text with blanks, and block 0. Each span of Part B is read as
    [start] + span and predicts span + [end], all at the position of its blank, in blocks 1, 2, 3 ...
    """
    text, blanks, last = [], [], 0
    for start, stop in spans:
        text += [tokens[last:start], [blank_id]]
        blanks.append(start - last + (blanks[-1] + 1 if blanks else 0))
        last = stop
    text = np.concatenate([*text, tokens[last:]])
    parts = [text], [np.full(len(text), IGNORE)], [np.arange(len(text))], [np.zeros(len(text))]
    for index in order:
        span = tokens[slice(*spans[index])]
        parts[0].append(np.concatenate([[start_id], span]))
        parts[1].append(np.concatenate([span, [end_id]]))
        parts[2].append(np.full(len(span) + 1, blanks[index]))
        parts[3].append(np.arange(1, len(span) + 2))
    return Infilling(*(np.concatenate(part).astype(np.int32) for part in parts), prefix=len(text))


@dataclass(frozen=True, kw_only=True, eq=False)
class BlankInfilling:
    """A text with blanks sees itself in both directions; what fills them is predicted in random order.

    token: spans of Poisson(3) tokens, 1 to 39, until 15% are cut out, at least one token between two.  sentence:
    whole sentences until 15%.  generation: one span at the end, at least a quarter of the text. A row is one document,
    framed by cls_id and eos_id where there are any, and takes one of the three at random.
    Batch: tokens, targets, positions, blocks (B, L), prefix_lengths (B,). Loss on what fills blanks only.

    mask_id, sentence_id, generation_id: the blank of each mode.  start_id, end_id: before and after what fills one.
    ends: which ids end a sentence (V,).  rates: of the three modes, default .5, .3, .2.  ratio: default 0.15.
    mean_span, longest_span: default 3 and 39.  min_generation: default 0.25.
    blocked_id, block_rate: in token mode, the share of the filling's inputs that is hidden by this token: by default
    0.1 where the tokenizer has one, else 0.
    """

    mask_id: int
    sentence_id: int
    generation_id: int
    start_id: int
    end_id: int
    ends: np.ndarray = field(repr=False)
    cls_id: int | None = None
    eos_id: int | None = None
    pad_id: int = 0
    blocked_id: int | None = None
    block_rate: float = 0.0
    rates: tuple[float, float, float] = (0.5, 0.3, 0.2)
    ratio: float = 0.15
    mean_span: float = 3.0
    longest_span: int = 39
    min_generation: float = 0.25

    def __post_init__(self) -> None:
        if len(self.rates) != len(MODES) or min(self.rates) < 0 or abs(sum(self.rates) - 1.0) > 1e-6:
            raise UsageError(f"rates are {self.rates}; expected three shares that sum to 1, of {', '.join(MODES)}")
        if self.block_rate > 0.0 and self.blocked_id is None:
            raise UsageError(f"block_rate is {self.block_rate}, but the tokenizer has no token {_BLOCKED}")
        if not 0.0 < self.ratio < 1.0 or self.longest_span < 1 or not 0.0 <= self.min_generation <= 1.0:
            raise UsageError("ratio is above 0 and below 1, longest_span at least 1, min_generation from 0 to 1")

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, **settings: Any) -> BlankInfilling:
        """With the tokenizer's tokens. Raises TokenizerError when it lacks one of them."""
        found = {}
        for role, names in _NAMES.items():
            numbers = [number for name in names if (number := tokenizer.token_id(name)) is not None]
            if not numbers:
                raise TokenizerError(f"blank infilling needs a tokenizer with {' or '.join(names)}")
            found[role] = numbers[0]
        blocked = tokenizer.token_id(_BLOCKED)
        defaults = {
            "cls_id": tokenizer.cls_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id or 0,
            "blocked_id": blocked, "block_rate": 0.0 if blocked is None else 0.1, "ends": sentence_ends(tokenizer),
        }  # fmt: skip
        return cls(**{**found, **defaults, **settings})

    @property
    def packs(self) -> bool:
        """A row is one document: its text is one prefix."""
        return False

    def row_length(self, max_length: int) -> int:
        """Raw tokens that fit with their blanks: room for four standard deviations more spans than the mean."""
        length = max_length - self._frame - 2
        while length > 1 and length + self._frame + 2 * self._usual_spans(length) > max_length:
            length -= 1
        if length < 1:
            raise UsageError(f"max_length is {max_length}; a text with a blank needs at least {self._frame + 3} tokens")
        return length

    def batch(self, rows: list[Row], rng: np.random.Generator, max_length: int) -> Batch:
        """tokens, targets, positions, blocks (B, L), prefix_lengths (B,)."""
        filled = []
        for row in rows:
            text = joined(row, self.row_length(max_length), drop=self.eos_id)
            mode = MODES[int(rng.choice(len(MODES), p=self.rates))]
            filled.append(self.corrupt(text, mode, rng, max_length))
        length = padded_length(max(len(one.tokens) for one in filled), max_length)
        return {
            "tokens": pad([one.tokens for one in filled], length, self.pad_id),
            "targets": pad_targets([one.targets for one in filled], length),
            "positions": pad([one.positions for one in filled], length, 0),
            "blocks": pad([one.blocks for one in filled], length, 0),
            "prefix_lengths": lengths([one.tokens[: one.prefix] for one in filled]),
        }

    def corrupt(self, text: np.ndarray, mode: str, rng: np.random.Generator, max_length: int) -> Infilling:
        """Text and filling of a raw text (n,) in one of MODES; never longer than max_length."""
        most = (max_length - self._frame - len(text)) // 2
        if mode == "token":
            spans = place_spans(self.span_lengths(len(text), most, rng), len(text), rng)
        elif mode == "sentence":
            spans = self.sentences(text, most, rng)
        else:
            least = max(1, int(self.min_generation * len(text)))
            spans = [(len(text) - int(rng.integers(least, len(text) + 1)), len(text))]
        before = [] if self.cls_id is None else [self.cls_id]
        after = [] if self.eos_id is None else [self.eos_id]
        framed = np.concatenate([before, text, after]).astype(np.int32)
        spans = [(start + len(before), stop + len(before)) for start, stop in spans]
        blank = {"token": self.mask_id, "sentence": self.sentence_id, "generation": self.generation_id}[mode]
        filled = fill_in(framed, spans, rng.permutation(len(spans)), blank, self.start_id, self.end_id)
        if mode == "token" and self.block_rate > 0.0:
            hidden = (filled.blocks > 1) & (rng.random(len(filled.blocks)) < self.block_rate)
            filled = filled._replace(tokens=np.where(hidden, self.blocked_id, filled.tokens).astype(np.int32))
        return filled

    def span_lengths(self, length: int, most: int, rng: np.random.Generator) -> list[int]:
        """Lengths of the spans of a text of `length` tokens, until the ratio is reached, at least one, at most `most`.

        A span is shortened where it would not fit the text with a token between two spans.
        """
        weights = poisson_weights(self.mean_span, self.longest_span)
        wanted, drawn = max(1, int(self.ratio * length)), []
        while sum(drawn) < wanted and len(drawn) < max(most, 1):
            room = length - sum(drawn) - len(drawn)
            if room < 1:
                break
            drawn.append(min(int(rng.choice(len(weights), p=weights)) + 1, room))
        return drawn

    def sentences(self, text: np.ndarray, most: int, rng: np.random.Generator) -> list[Span]:
        """Random whole sentences of a text (n,) until the ratio is reached, in order; its rest is one as well."""
        stops = np.flatnonzero(self.ends[text]) + 1
        stops = stops if len(stops) and stops[-1] == len(text) else np.append(stops, len(text))
        spans = list(zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True))
        wanted, chosen, hidden = max(1, int(self.ratio * len(text))), [], 0
        for index in rng.permutation(len(spans))[: max(most, 1)]:
            chosen.append(spans[index])
            hidden += spans[index][1] - spans[index][0]
            if hidden >= wanted:
                break
        return sorted(chosen)

    @property
    def _frame(self) -> int:
        return (self.cls_id is not None) + (self.eos_id is not None)

    def _usual_spans(self, length: int) -> int:
        mean = self.ratio * length / self.mean_span
        return 1 + int(np.ceil(mean + 2.0 * np.sqrt(mean)))
