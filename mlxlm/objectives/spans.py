"""Which tokens of a text are hidden: random cuts, noise masks and places of spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlxlm.errors import UsageError

Span = tuple[int, int]  # [start, stop)


def random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths (parts,) of non-empty pieces of `total`; all ways to cut are equally likely. 1 <= parts <= total."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Tokens to hide and spans to hide them in, of `length` tokens (Raffel et al. 2019, arXiv:1910.10683).

    At least one token is hidden and at least one is not, where there are two. (0, 0) for a single token.
    """
    noise = min(max(round(length * density), 1), length - 1)
    if noise < 1:
        return 0, 0
    return noise, min(max(1, round(noise / mean_span)), noise, length - noise)


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """Which tokens are hidden, bool (length,): spans of noise between spans that stay, beginning with one that stays.

    The numbers of tokens and spans are exact (`noise_counts`), their lengths are random.
    """
    noise, spans = noise_counts(length, density, mean_span)
    if noise == 0:
        return np.zeros(length, dtype=bool)
    pieces = np.stack([random_parts(length - noise, spans, rng), random_parts(noise, spans, rng)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, pieces)


def spans_of(mask: np.ndarray) -> list[Span]:
    """The runs of True in a mask, [start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def raw_length(max_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Raw tokens that are cut down to at most `max_length` by span corruption, and the length of their target.

    Input: what stays, a sentinel a span, the end. Target: what is hidden, a sentinel a span, the end.
    (512 -> 568 and 114, 128 -> 141 and 29.) Raises UsageError when max_length is below 3, which no text fits.
    """
    if max_length < 3:
        raise UsageError(f"max_length is {max_length}; a corrupted text needs at least 3 tokens")

    def corrupted(length: int) -> tuple[int, int]:
        noise, spans = noise_counts(length, density, mean_span)
        return length - noise + spans + 1, noise + spans + 1

    length = 1
    while corrupted(length + 1)[0] <= max_length:
        length += 1
    return length, corrupted(length)[1]


def poisson_weights(mean: float, longest: int) -> np.ndarray:
    """Probabilities of the lengths 1 .. longest, a Poisson distribution without its other values."""
    length = np.arange(1, longest + 1)
    log = length * np.log(mean) - np.cumsum(np.log(length))
    weights = np.exp(log - log.max())
    return weights / weights.sum()


def place_spans(span_lengths: Sequence[int], total: int, rng: np.random.Generator) -> list[Span]:
    """Random places of spans within `total` tokens, in order, at least one token apart.

    Raises UsageError when they don't fit.
    """
    free = total - sum(span_lengths) - (len(span_lengths) - 1)
    if free < 0:
        raise UsageError(f"spans of {sum(span_lengths)} tokens with gaps between don't fit {total} tokens")
    spans, offset = [], 0
    for place, length in zip(np.sort(rng.integers(0, free + 1, len(span_lengths))), span_lengths, strict=True):
        start = int(place) + offset
        spans.append((start, start + int(length)))
        offset += int(length) + 1
    return spans
