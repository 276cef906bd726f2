"""The rows of a batch that are being answered: one cache, one sampler, one token a row and step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.errors import MlxlmError
from mlxlm.generation.requests import Likelihoods, Request, TokenChoice, added
from mlxlm.generation.sampler import Sampler
from mlxlm.generation.sampling import chosen
from mlxlm.generation.stepping import Stepping, make_step
from mlxlm.layers import Cache, CacheSpec

if TYPE_CHECKING:
    from mlxlm.models import Transformer


@dataclass(eq=False)
class Row:
    """One answer in the making.

    request: what was asked for.  owner: whatever the caller tells rows apart by.  answer: tokens that were read.
    launched: how many were chosen on the device, at least as many.  limit: most tokens of the answer, default what the
    request says.  error: what one of its processors raised, which ends this answer and no other.
    """

    request: Request
    owner: Any = None
    limit: int = 0
    answer: list[int] = field(default_factory=list)
    launched: int = 0
    error: MlxlmError | None = None

    def __post_init__(self) -> None:
        self.limit = self.limit or self.request.max_tokens

    @property
    def longest(self) -> int:
        """Tokens that it needs a cache for at most."""
        return len(self.request.tokens) + self.limit


class Rows:
    """Answers that are made together, a token of each a step. Rows join and leave between steps.

    The device never waits for Python: the step that follows is launched before the tokens of this one are read. So a
    row that ends is part of one more step, whose token is dropped. Rows with processors are the exception: their next
    token is chosen after the last one is read, while the logits are being computed.

    words: ids from there on are never chosen.
    """

    def __init__(self, model: Transformer, words: int, *, spec: CacheSpec, stepping: Stepping | None = None):
        self.model = model
        self.words = words
        self.cache: Cache = model.make_cache(spec)
        self.rows: list[Row] = []
        self._spec = spec
        self._step = make_step(model, stepping)
        self._sampler = Sampler(words)
        # Tokens (B,) that were chosen and not read yet, and what is known of them.
        self._tokens: mx.array | None = None
        self._likelihoods: Likelihoods | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, rows: Sequence[Row], cache: Cache, logits: mx.array) -> None:
        """Take in rows whose prompts the cache holds.  logits (n, V): of what follows each prompt."""
        likelihoods = max((row.request.likelihoods or 0 for row in rows), default=0)
        sampler = Sampler(self.words)
        sampler.join([row.request.sampling for row in rows], [row.request.tokens for row in rows])
        tokens, known = self._choose(rows, sampler, logits, likelihoods)
        self._merge_sampler(sampler)
        if not self.rows:
            self.cache = cache
            self._tokens, self._likelihoods = tokens, known
        else:
            self.cache.join([cache])
            self._tokens = mx.concatenate([self._tokens, tokens])
            if self._likelihoods is not None or known is not None:
                held = Likelihoods.empty(len(self.rows)) if self._likelihoods is None else self._likelihoods
                self._likelihoods = held.join(Likelihoods.empty(len(rows)) if known is None else known)
        self.rows = [*self.rows, *rows]
        self.cache.bound(max(row.longest for row in self.rows))
        for row in rows:
            row.launched += 1
        mx.async_eval(self._tokens, *(self._likelihoods.arrays() if self._likelihoods else ()))

    def _merge_sampler(self, sampler: Sampler) -> None:
        if self._sampler.samplings:
            self._sampler.extend(sampler)
        else:
            self._sampler = sampler

    def step(self) -> list[tuple[Row, TokenChoice]]:
        """One step: launches the next tokens, then reads those launched before. Rows that are done leave.

        The last token of a row with an `error` means nothing; its finish_reason is "cancelled".

        Raises WeightsError when the model's logits are not numbers.
        """
        if not self.rows:
            return []
        tokens, known = self._tokens, self._likelihoods
        assert tokens is not None
        going_on = any(row.launched < row.limit for row in self.rows)
        # A -1 for logits that were no numbers stands for some word here; reading it is an error below.
        logits = self._step(tokens, self.cache) if going_on else None
        waits = any(row.request.processors for row in self.rows)
        likelihoods = max((row.request.likelihoods or 0 for row in self.rows), default=0)
        if logits is not None and not waits:
            self._launch(logits, likelihoods)
        elif logits is not None:
            mx.async_eval(logits)
        read = self._read(tokens, known)
        left = [i for i, (_, choice) in enumerate(read) if choice.finish_reason is None]
        if logits is not None and waits and len(left) < len(read):
            logits = logits[mx.array(left, dtype=mx.int32)]
        self._keep(left)
        if logits is not None and waits and left:
            self._launch(logits, likelihoods)
        return read

    def drop(self, rows: Iterable[Row]) -> None:
        """Let rows leave that are not wanted any more."""
        gone = {id(row) for row in rows}
        self._keep([i for i, row in enumerate(self.rows) if id(row) not in gone])

    def _launch(self, logits: mx.array, likelihoods: int) -> None:
        self._tokens, self._likelihoods = self._choose(self.rows, self._sampler, logits, likelihoods)
        for row in self.rows:
            row.launched += 1
        mx.async_eval(self._tokens, *(self._likelihoods.arrays() if self._likelihoods else ()))

    def _choose(
        self, rows: Sequence[Row], sampler: Sampler, logits: mx.array, likelihoods: int
    ) -> tuple[mx.array, Likelihoods | None]:
        changes = None
        if any(row.request.processors for row in rows):
            changes = mx.stack([self._added(row) for row in rows])
        tokens = sampler(logits, changes)
        if all(row.request.likelihoods is None for row in rows):
            return tokens, None
        return tokens, Likelihoods.of(logits, tokens, self.words, likelihoods)

    def _added(self, row: Row) -> mx.array:
        total = None
        try:
            total = added(row.request.processors, row.answer, self.words)
        except MlxlmError as error:
            row.error = error
        return mx.zeros((self.words,)) if total is None else total

    def _read(self, tokens: mx.array, known: Likelihoods | None) -> list[tuple[Row, TokenChoice]]:
        scores = known.read() if known is not None else [(None, ())] * len(self.rows)
        read = []
        for row, token, (score, likeliest) in zip(self.rows, tokens.tolist(), scores, strict=True):  # type: ignore
            request = row.request
            row.answer.append(chosen(token))
            reason = None
            if row.error is not None:
                reason = "cancelled"
            elif token in request.stop_tokens:
                reason = "stop"
            elif len(row.answer) >= row.limit:
                reason = "length"
            wanted = request.likelihoods
            choice = TokenChoice(
                token,
                None if wanted is None else score,
                likeliest[:wanted] if wanted else (),
                reason,  # type: ignore[arg-type]
            )
            read.append((row, choice))
        return read

    def _keep(self, left: list[int]) -> None:
        if len(left) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in left]
        if not left:
            self.cache, self._sampler = self.model.make_cache(self._spec), Sampler(self.words)
            self._tokens = self._likelihoods = None
            return
        self.cache.take(left)
        self._sampler.take(left)
        chosen_rows = mx.array(left)
        self._tokens = None if self._tokens is None else self._tokens[chosen_rows]
        if self._likelihoods is not None:
            self._likelihoods = self._likelihoods.take(chosen_rows)
