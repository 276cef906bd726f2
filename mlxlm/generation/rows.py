"""The rows of a batch that are being answered: one cache, one sampler, one token a row and step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.errors import MlxlmError
from mlxlm.generation.requests import FinishReason, Likelihoods, Request, TokenChoice, added
from mlxlm.generation.sampler import Sampler
from mlxlm.generation.sampling import chosen
from mlxlm.generation.stepping import Stepping, default_stepping, make_step
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


@dataclass(eq=False)
class _Launched:
    """What one step chose and nobody has read yet: tokens (B,), one for each row, and what is known of them."""

    rows: list[Row]
    tokens: mx.array
    known: Likelihoods | None

    def extend(self, other: _Launched) -> None:
        """Take in other rows."""
        if self.known is not None or other.known is not None:
            one, two = (each.known or Likelihoods.empty(len(each.rows)) for each in (self, other))
            self.known = one.join(two)
        self.tokens = mx.concatenate([self.tokens, other.tokens])
        self.rows = [*self.rows, *other.rows]

    def leave(self, gone: set[int]) -> None:
        """Forget rows, given by their `id`."""
        left = [i for i, row in enumerate(self.rows) if id(row) not in gone]
        if len(left) < len(self.rows) and left:
            chosen_rows = mx.array(left)
            self.tokens = self.tokens[chosen_rows]
            self.known = None if self.known is None else self.known.take(chosen_rows)
        self.rows = [self.rows[i] for i in left]

    def start(self) -> None:
        """Let the device compute it."""
        mx.async_eval(self.tokens, *(self.known.arrays() if self.known else ()))

    def read(self) -> list[tuple[Row, TokenChoice]]:
        """The token of each row, once it is there. Raises WeightsError when the model's logits were not numbers."""
        scores = self.known.read() if self.known is not None else [(None, ())] * len(self.rows)
        return [
            (row, self._choice(row, token, *score))
            for row, token, score in zip(self.rows, self.tokens.tolist(), scores, strict=True)  # type: ignore
        ]

    @staticmethod
    def _choice(row: Row, token: int, score: float | None, likeliest: tuple[tuple[int, float], ...]) -> TokenChoice:
        request = row.request
        row.answer.append(chosen(token))
        reason: FinishReason | None = None
        if row.error is not None:
            reason = "cancelled"
        elif token in request.stop_tokens:
            reason = "stop"
        elif len(row.answer) >= row.limit:
            reason = "length"
        wanted = request.likelihoods
        return TokenChoice(token, None if wanted is None else score, likeliest[:wanted] if wanted else (), reason)


class Rows:
    """Answers that are made together, a token of each a step. Rows join and leave between steps.

    The device never waits for Python: as many steps as `Stepping.ahead` says are launched before the tokens of one are
    read. So a row that ends with a stop token is part of so many more steps, whose tokens are dropped; one that has all
    its tokens launched leaves at once. Rows with processors are the exception: their next token is chosen after the
    last one is read, while the logits are being computed.

    words: ids from there on are never chosen.
    """

    def __init__(self, model: Transformer, words: int, *, spec: CacheSpec, stepping: Stepping | None = None):
        self.model = model
        self.words = words
        self.cache: Cache = model.make_cache(spec)
        # Those that are in the cache; others have nothing left but launched tokens.
        self.rows: list[Row] = []
        stepping = default_stepping() if stepping is None else stepping
        self._ahead = stepping.ahead
        self._spec = spec
        self._step = make_step(model, stepping)
        self._sampler = Sampler(words)
        # The last tokens (B,) of `rows`, which the next step reads, and what is launched, oldest first.
        self._tokens: mx.array | None = None
        self._launched: deque[_Launched] = deque()

    @property
    def unfinished(self) -> list[Row]:
        """All rows whose answers are not whole yet."""
        rows = {id(row): row for launched in self._launched for row in launched.rows}
        return list((rows | {id(row): row for row in self.rows}).values())

    def __len__(self) -> int:
        return len(self.unfinished)

    def join(self, rows: Sequence[Row], cache: Cache, logits: mx.array) -> None:
        """Take in rows whose prompts the cache holds.  logits (n, V): of what follows each prompt."""
        sampler = Sampler(self.words)
        sampler.join([row.request.sampling for row in rows], [row.request.tokens for row in rows])
        launched = self._chosen(rows, sampler, logits)
        if self.rows:
            self._sampler.extend(sampler)
            self.cache.join([cache])
            self._tokens = mx.concatenate([self._tokens, launched.tokens])
        else:
            self._sampler, self.cache, self._tokens = sampler, cache, launched.tokens
        self.rows = [*self.rows, *rows]
        if self._launched:
            self._launched[-1].extend(launched)
        else:
            self._launched.append(launched)
        self._launched[-1].start()
        self.cache.bound(max(row.longest for row in self.rows))
        self._let_go()

    def step(self) -> list[tuple[Row, TokenChoice]]:
        """One step: launches the next tokens, then reads those that were launched some steps before.

        A row has at most one token among them, but more where rows with processors have just joined. Rows that are done
        leave. The last token of a row with an `error` means nothing; its finish_reason is "cancelled".

        Raises WeightsError when the model's logits are not numbers.
        """
        before = self.rows
        waits = any(row.request.processors for row in before)
        # A -1 for logits that were no numbers stands for some word here; reading it is an error below.
        logits = self._step(self._tokens, self.cache) if before else None  # type: ignore[arg-type]
        if logits is not None and waits:
            mx.async_eval(logits)
        elif logits is not None:
            self._launch(logits)
        unread = max(len(self._launched) - 1, 0) if logits is None else 0 if waits else self._ahead
        read = []
        while len(self._launched) > unread:
            made = self._launched[0].read()
            self._launched.popleft()
            read += made
            self._leave({id(row) for row, choice in made if choice.finish_reason is not None})
        if logits is not None and waits and self.rows:
            if len(self.rows) < len(before):
                staying = {id(row) for row in self.rows}
                left = [i for i, row in enumerate(before) if id(row) in staying]
                logits = logits[mx.array(left, dtype=mx.int32)]
            self._launch(logits)
        return read

    def drop(self, rows: Iterable[Row]) -> None:
        """Let rows leave that are not wanted any more."""
        self._leave({id(row) for row in rows})

    def _launch(self, logits: mx.array) -> None:
        launched = self._chosen(self.rows, self._sampler, logits)
        self._tokens = launched.tokens
        self._launched.append(launched)
        launched.start()
        self._let_go()

    def _chosen(self, rows: Sequence[Row], sampler: Sampler, logits: mx.array) -> _Launched:
        changes = None
        if any(row.request.processors for row in rows):
            changes = mx.stack([self._added(row) for row in rows])
        tokens, known = sampler(logits, changes), None
        wanted = [row.request.likelihoods for row in rows if row.request.likelihoods is not None]
        if wanted:
            known = Likelihoods.of(logits, tokens, self.words, max(wanted))
        for row in rows:
            row.launched += 1
        return _Launched(list(rows), tokens, known)

    def _added(self, row: Row) -> mx.array:
        total = None
        try:
            total = added(row.request.processors, row.answer, self.words)
        except MlxlmError as error:
            row.error = error
        return mx.zeros((self.words,)) if total is None else total

    def _let_go(self) -> None:
        """Rows whose last token is launched need no cache any more."""
        self._keep([i for i, row in enumerate(self.rows) if row.launched < row.limit])

    def _leave(self, gone: set[int]) -> None:
        if not gone:
            return
        for launched in self._launched:
            launched.leave(gone)
        self._launched = deque(launched for launched in self._launched if launched.rows)
        self._keep([i for i, row in enumerate(self.rows) if id(row) not in gone])

    def _keep(self, left: list[int]) -> None:
        if len(left) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in left]
        if not left:
            self.cache, self._sampler = self.model.make_cache(self._spec), Sampler(self.words)
            self._tokens = None
            return
        self.cache.take(left)
        self._sampler.take(left)
        self._tokens = self._tokens[mx.array(left)]  # type: ignore[index]
