"""Choosing the next tokens of many answers at once, each with its own sampling and random numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from mlxlm import runtime
from mlxlm.errors import SamplingError
from mlxlm.generation.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, penalize


@dataclass(frozen=True)
class _Work:
    """What there is to do for a set of rows, decided in Python so that nothing else is done on the device.

    single: there is one row.  draws: whether some rows draw at random; all_draw: all of them.  top_k: what the rows
    that draw ask for, no value twice.  top_p, min_p: whether some ask for it.
    """

    vocab_size: int
    single: bool = False
    draws: bool = False
    all_draw: bool = False
    top_k: tuple[int, ...] = ()
    top_p: bool = False
    min_p: bool = False


class Sampler:
    """Chooses the next token of each row of a batch; see `Sampling`. Rows come (`join`) and go (`take`).

    vocab_size: ids from there on are never chosen. What a row draws depends on its own seed alone, not on the others.
    compiled: draw by one compiled function; default on GPUs, where each of its kernels costs as much as a layer's.
    """

    def __init__(self, vocab_size: int, *, compiled: bool | None = None):
        self.vocab_size = vocab_size
        self.compiled = runtime.backend() != "cpu" if compiled is None else compiled
        self.samplings: list[Sampling] = []
        # Random keys (B, 2), what is added to logits (B, V) and what occurred (B, V); None while no row needs it.
        self._keys = mx.zeros((0, 2), dtype=mx.uint32)
        self._bias: mx.array | None = None
        self._seen: mx.array | None = None
        self._settle()

    def join(self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> None:
        """Append rows.  prompts: tokens that count as having occurred, one list a row."""
        made, size = Sampler(self.vocab_size), self.vocab_size
        made.samplings = list(samplings)
        seeds = [int.from_bytes(os.urandom(4), "little") if s.seed is None else s.seed for s in samplings]
        made._keys = mx.stack([mx.random.key(seed) for seed in seeds])
        if any(sampling.logit_bias for sampling in samplings):
            made._bias = mx.stack([_bias(sampling, size) for sampling in samplings])
        if any(sampling.repetition_penalty != 1 for sampling in samplings):
            made._seen = mx.zeros((len(seeds), size), dtype=mx.bool_)
            for row, prompt in enumerate(prompts):
                made._seen[row, mx.array(list(prompt))] = True
        self.extend(made)

    def extend(self, other: Sampler) -> None:
        """Append the rows of another sampler, as far as they have come."""
        before, more, size = len(self.samplings), len(other.samplings), self.vocab_size
        self.samplings = [*self.samplings, *other.samplings]
        self._keys = mx.concatenate([self._keys, other._keys])
        for name, dtype in (("_bias", mx.float32), ("_seen", mx.bool_)):
            one, two = getattr(self, name), getattr(other, name)
            if one is not None or two is not None:
                one = mx.zeros((before, size), dtype=dtype) if one is None else one
                two = mx.zeros((more, size), dtype=dtype) if two is None else two
                setattr(self, name, mx.concatenate([one, two]))
        self._settle()

    def take(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was."""
        chosen = mx.array(list(rows), dtype=mx.int32)
        self.samplings = [self.samplings[row] for row in rows]
        self._keys = self._keys[chosen]
        self._bias = None if self._bias is None else self._bias[chosen]
        self._seen = None if self._seen is None else self._seen[chosen]
        self._settle()

    def _settle(self) -> None:
        """What depends on the set of rows, made once: one number a row, (B, 1)."""
        rows = self.samplings

        def column(values: list[float]) -> mx.array:
            return mx.array(values, dtype=mx.float32).reshape(-1, 1)

        drawing = [sampling for sampling in rows if sampling.temperature > 0]
        self._work = _Work(
            self.vocab_size,
            single=len(rows) == 1,
            draws=bool(drawing),
            all_draw=len(drawing) == len(rows),
            top_k=tuple(sorted({sampling.top_k for sampling in drawing})),
            top_p=any(sampling.top_p < 1 for sampling in drawing),
            min_p=any(sampling.min_p > 0 for sampling in drawing),
        )
        self._drawn = mx.array([sampling.temperature > 0 for sampling in rows], dtype=mx.bool_)
        self._temperature = column([sampling.temperature or 1.0 for sampling in rows])
        self.penalty = column([sampling.repetition_penalty for sampling in rows])
        # A row without a filter gets a border that nothing reaches.
        self._k = mx.array([sampling.top_k or self.vocab_size for sampling in rows], dtype=mx.int32).reshape(-1, 1)
        self._p = column([sampling.top_p if sampling.top_p < 1 else 2.0 for sampling in rows])
        self._share = column([sampling.min_p for sampling in rows])

    def __call__(self, logits: mx.array, added: mx.array | None = None) -> mx.array:
        """The next token of each row, (B,) int32, from logits (B, V or more); added (B, V): to them, before anything.

        -1 for a row with a logit that is not a number: `chosen` makes an error of it once the token is read.
        """
        if not (self.compiled and self._work.draws):
            return self._choose(logits, added)
        held = {name: array for name in _ARRAYS if (array := getattr(self, name)) is not None}
        tokens, changed = _compiled(self._work)(logits, [] if added is None else [added], held)
        for name, array in changed.items():
            setattr(self, name, array)
        return tokens

    def _choose(self, logits: mx.array, added: mx.array | None) -> mx.array:
        work = self._work
        if logits.shape[-1] > self.vocab_size:
            logits = logits[:, : self.vocab_size]
        broken = mx.any(mx.isnan(logits), axis=-1)
        logits = self.processed(logits, added)
        greedy = None if work.all_draw else mx.argmax(logits, axis=-1)
        if greedy is not None and not work.draws:
            tokens = greedy
        else:
            drawn = mx.argmax(self.filtered(logits) + self.noise(), axis=-1)
            tokens = drawn if greedy is None else mx.where(self._drawn, drawn, greedy)
        self.observe(tokens)
        # The largest of 32 bits is -1 when it is read with a sign, which takes no kernel as a conversion would.
        return mx.where(broken, mx.array(2**32 - 1, dtype=mx.uint32), tokens).view(mx.int32)

    def observe(self, tokens: mx.array) -> None:
        """Count tokens (B,) as having occurred."""
        if self._seen is not None:
            self._seen = self._seen | (mx.arange(self.vocab_size) == tokens[:, None])

    def processed(self, logits: mx.array, added: mx.array | None = None) -> mx.array:
        """Logits (B, V) with what is added to them and penalties for repetition."""
        if added is not None:
            logits = logits.astype(mx.float32) + added
        if self._seen is not None:
            logits = penalize(logits.astype(mx.float32), self._seen, self.penalty)
        return self.biased(logits)

    def biased(self, logits: mx.array) -> mx.array:
        """Logits (B, V) with the biases of the rows."""
        return logits if self._bias is None else logits.astype(mx.float32) + self._bias

    def filtered(self, logits: mx.array) -> mx.array:
        """Logits (B, V), divided by the temperature and with those that may not be drawn at -inf."""
        logits = logits.astype(mx.float32)
        # The largest is made 0 first, so that a tiny temperature gives the greedy choice and not infinities.
        logits = (logits - mx.max(logits, axis=-1, keepdims=True)) / self._temperature
        work = self._work
        if any(0 < k < logits.shape[-1] for k in work.top_k):
            if len(work.top_k) == 1:
                logits = keep_top_k(logits, work.top_k[0])
            else:
                ordered = mx.sort(logits, axis=-1)
                border = mx.take_along_axis(ordered, mx.maximum(self.vocab_size - self._k, 0), axis=-1)
                logits = mx.where(logits < border, -mx.inf, logits)
        if work.top_p:
            logits = keep_top_p(logits, self._p)
        if work.min_p:
            logits = keep_min_p(logits, self._share)
        return logits

    # For one row, of which several tokens are looked at together.

    @property
    def is_greedy(self) -> bool:
        """Whether no row draws at random."""
        return not self._work.draws

    def seen_after(self, tokens: mx.array) -> mx.array | None:
        """What has occurred before and after each of tokens (k,), (k + 1, V) bool; None where nobody asks."""
        if self._seen is None:
            return None
        ones = (mx.arange(self.vocab_size) == tokens[:, None]).astype(mx.int32)
        grown = mx.cumsum(ones, axis=0) > 0
        return mx.concatenate([self._seen, self._seen | grown]) if tokens.size else self._seen

    def observe_all(self, tokens: mx.array) -> None:
        """Count tokens (k,) of the one row as having occurred."""
        seen = self.seen_after(tokens)
        self._seen = None if seen is None else seen[-1:]

    def key(self) -> mx.array:
        """A random key that is used for nothing else, of the one row."""
        keys = mx.random.split(self._keys[0])
        self._keys = keys[:1]
        return keys[1]

    def noise(self) -> mx.array:
        """Gumbel noise (B, V): the largest of logits and noise is distributed as the logits say (Gumbel 1954)."""
        shape = (self.vocab_size,)
        if self._work.single:
            return mx.random.gumbel(shape, key=self.key())[None]
        keys = mx.vmap(mx.random.split)(self._keys)
        self._keys = keys[:, 0]
        return mx.vmap(lambda key: mx.random.gumbel(shape, key=key))(keys[:, 1])


# What a choice reads, and what of that it changes.
_ARRAYS = ("_keys", "_bias", "_seen", "_drawn", "_temperature", "penalty", "_k", "_p", "_share")
_CHANGED = ("_keys", "_seen")


@cache
def _compiled(work: _Work) -> Callable[..., tuple[mx.array, dict[str, mx.array]]]:
    """`Sampler._choose` as a compiled function of logits, what is added to them, and the arrays of a sampler."""

    def choose(
        logits: mx.array, added: list[mx.array], held: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        sampler = Sampler(work.vocab_size, compiled=False)
        sampler._work = work
        for name, array in held.items():
            setattr(sampler, name, array)
        tokens = sampler._choose(logits, *added or [None])
        return tokens, {name: getattr(sampler, name) for name in _CHANGED if name in held}

    return mx.compile(choose)


def check_biases(sampling: Sampling, vocab_size: int) -> None:
    """Raise SamplingError for a logit bias of an id that is none."""
    for token in sampling.logit_bias:
        if not 0 <= token < vocab_size:
            raise SamplingError(f"logit_bias names token {token}, but ids run from 0 to {vocab_size - 1}")


def _bias(sampling: Sampling, vocab_size: int) -> mx.array:
    """The logit biases of a row, (V,)."""
    check_biases(sampling, vocab_size)
    bias = mx.zeros((vocab_size,))
    if not sampling.logit_bias:
        return bias
    ids = mx.array(list(sampling.logit_bias))
    return bias.at[ids].add(mx.array(list(sampling.logit_bias.values())))
