"""Who is read and who is answered next: continuous batching, one step at a time and without threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.errors import PromptError, UsageError
from mlxlm.generation.plan import cache_bytes, plan_generation, prefill_chunk, value_bytes
from mlxlm.generation.requests import Request, TokenChoice
from mlxlm.generation.rows import Row, Rows
from mlxlm.generation.sampler import check_biases
from mlxlm.generation.stepping import Stepping
from mlxlm.generation.steps import check_generates, check_ids, pad, room
from mlxlm.layers import Cache, CacheSpec

if TYPE_CHECKING:
    from mlxlm.models import Transformer


@dataclass(eq=False)
class _Reading:
    """A prompt that is being read, for one row or for several that begin with the same one."""

    rows: list[Row]
    cache: Cache | None = None
    done: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.rows[0].request.tokens

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


class Scheduler:
    """Continuous batching for decoders: requests join and leave between steps.

    A step reads one chunk of prompts and makes one token for every row that is being answered. Long prompts are read
    chunk by chunk, in turn with those that wait beside them, so neither the rows being answered nor a short prompt wait
    for a long one to be read. Rows are let in, first come first served, as long as there is a slot and the caches of
    all rows, at their longest, stay within `cache_limit` bytes.

    words: ids from there on are never chosen.  max_rows: answered at once.  chunk: tokens of prompts read in a step,
    default what the memory plan says.  cache_limit: default a share of the free memory, see `plan_generation`.
    patient: nobody waits for a single token, so a step reads all prompts that are let in, chunk by chunk, before it
    makes tokens: there are fewer steps, and rows of one length stay so, which is faster. Default False.
    """

    def __init__(
        self,
        model: Transformer,
        words: int,
        *,
        max_rows: int = 16,
        chunk: int | None = None,
        spec: CacheSpec | None = None,
        cache_limit: int | None = None,
        stepping: Stepping | None = None,
        patient: bool = False,
    ):
        check_generates(model)
        if model.config.has_memory:
            raise UsageError("continuous batching is for decoders; batch_generate serves encoder-decoder models")
        vocabulary = model.config.embeddings.vocab_size
        if not 1 <= words <= vocabulary:
            raise UsageError(f"words is {words}; the model has {vocabulary}, so valid are 1 to {vocabulary}")
        if max_rows < 1 or (chunk is not None and chunk < 1):
            raise UsageError("max_rows and chunk are at least 1")
        self.model = model
        self.words = words
        # Rows of one pass share what the length of the context makes of positions; such models take one row at a time.
        self.max_rows = max_rows if model.rows_are_independent else 1
        self.chunk = prefill_chunk(model) if chunk is None else chunk
        self.spec = CacheSpec(ragged=True) if spec is None else spec
        if not self.spec.ragged:
            raise UsageError("rows of a batch have different lengths: give a CacheSpec(ragged=True)")
        self.cache_limit = plan_generation(model, spec=self.spec, cache_limit=cache_limit).cache_limit
        self.patient = patient
        self._size = value_bytes(model)
        self._waiting: deque[list[Row]] = deque()
        self._reading: deque[_Reading] = deque()
        # Rows whose prompts are part of the pass that runs now.
        self._current: list[Row] = []
        self.rows = Rows(model, words, spec=self.spec, stepping=stepping)

    def add(self, request: Request, owner: Any = None, copies: int = 1) -> list[Row]:
        """Ask for an answer, or for several to the same prompt, which is then read once.

        owner: kept in the rows.  Raises what `check` raises.
        """
        limit = self.check(request, copies)
        rows = [Row(request, owner, limit=limit) for _ in range(copies)]
        self._waiting.append(rows)
        return rows

    def check(self, request: Request, copies: int = 1) -> int:
        """Most tokens of the answer to a request. Computes nothing on the device.

        Raises PromptError for a prompt that the model can't read, UsageError for one whose cache alone would be too
        large, and SamplingError for a bias on tokens that there aren't.
        """
        if copies < 1 or copies > self.max_rows:
            raise UsageError(f"{copies} answers to one prompt; valid are 1 to {self.max_rows}, the rows of a batch")
        if not request.tokens:
            raise PromptError("the prompt is empty: it has no tokens")
        check_ids(self.model, request.tokens)
        check_biases(request.sampling, self.words)
        limit = room(self.model, request.tokens, request.max_tokens)
        longest = len(request.tokens) + limit
        needed = copies * self.row_bytes(longest)
        if self.cache_limit is not None and needed > self.cache_limit:
            raise UsageError(
                f"prompt and answer of up to {longest} tokens need {needed / 1e6:.1f} MB of cache, but the "
                f"limit is {self.cache_limit / 1e6:.1f} MB; ask for fewer tokens"
            )
        return limit

    def row_bytes(self, length: int) -> int:
        """Bytes of the cache of a row of that length."""
        return cache_bytes(self.model.config, length, spec=self.spec, size=self._size)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of all rows now."""
        caches = [reading.cache for reading in self._reading if reading.cache is not None]
        return sum(cache.nbytes for cache in (self.rows.cache, *caches))

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting or self._reading or self.rows.unfinished)

    @property
    def waiting(self) -> int:
        """Rows that have not been let in."""
        return sum(map(len, self._waiting))

    @property
    def active(self) -> int:
        """Rows that are being read or answered."""
        return len(self.rows) + sum(len(reading.rows) for reading in self._reading)

    def step(self) -> list[tuple[Row, TokenChoice]]:
        """One step; the tokens that are known now, see `Rows.step`. A row ends with the one that has a reason to."""
        self._let_in()
        self._read()
        while self.patient and self._reading:
            mx.eval(self.rows.cache.arrays())  # else the activations of all passes would be there at once
            self._read()
        return self.rows.step()

    def drop(self, rows: Iterable[Row]) -> None:
        """Forget rows that nobody wants any more, wherever they are."""
        gone = {id(row) for row in rows}
        for queue in (self._waiting, self._reading):
            kept = []
            for entry in queue:
                held = entry.rows if isinstance(entry, _Reading) else entry
                held[:] = [row for row in held if id(row) not in gone]
                if held:
                    kept.append(entry)
            queue.clear()
            queue.extend(kept)  # type: ignore[arg-type]
        self.rows.drop([row for row in self.rows.unfinished if id(row) in gone])

    def abandon(self) -> list[Row]:
        """Forget all rows that are being read or answered, after an error; returns them. Those that wait stay."""
        rows = [*self.rows.unfinished, *self._current, *(row for reading in self._reading for row in reading.rows)]
        self._reading.clear()
        self._current = []
        self.rows.drop(self.rows.unfinished)
        return list({id(row): row for row in rows}.values())

    def _let_in(self) -> None:
        while self._waiting:
            rows = self._waiting[0]
            inside = [*self.rows.rows, *(row for reading in self._reading for row in reading.rows)]
            if len(inside) + len(rows) > self.max_rows:
                return
            # All rows of a batch have the room of the longest.
            longest = max(row.longest for row in (*inside, *rows))
            needed = (len(inside) + len(rows)) * self.row_bytes(longest)
            if inside and self.cache_limit is not None and needed > self.cache_limit:
                return
            self._reading.append(_Reading(self._waiting.popleft()))

    def _read(self) -> None:
        """Read one chunk: several short prompts as a batch, or a part of a long one."""
        if not self._reading:
            return
        first = self._reading.popleft()
        together = [first]
        if not first.done and first.left <= self.chunk:
            # Rows of one pass are padded to the longest, so those of like length go together.
            for other in list(self._reading):
                longest = max(reading.left for reading in (*together, other))
                shortest = min(reading.left for reading in (*together, other))
                if not other.done and (len(together) + 1) * longest <= self.chunk and longest <= 2 * shortest:
                    together.append(other)
                    self._reading.remove(other)
        self._current = [row for reading in together for row in reading.rows]
        logits, cache = self._pass(together)
        if cache is None:
            self._reading.append(first)  # to be read on, after the others
            self._current = []
            return
        counts = [len(reading.rows) for reading in together]
        if max(counts) > 1:
            origin = [i for i, count in enumerate(counts) for _ in range(count)]
            cache.take(origin)
            logits = logits[mx.array(origin)]
        self.rows.join(self._current, cache, logits)
        self._current = []

    def _pass(self, together: Sequence[_Reading]) -> tuple[mx.array, Cache | None]:
        """Logits (n, V) behind the prompts and the cache that holds them; no cache while a prompt is not read whole."""
        first = together[0]
        cache = first.cache or self.model.make_cache(self.spec)
        first.cache = cache
        if len(together) > 1:
            tokens, lengths = pad([reading.tokens for reading in together])
            ragged = len({len(reading.tokens) for reading in together}) > 1
            hidden = self.model.hidden(tokens, cache=cache, key_lengths=lengths if ragged else None)
            last = mx.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
            return self.model.logits(last), cache
        part = first.tokens[first.done : first.done + self.chunk]
        hidden = self.model.hidden(mx.array([part]), cache=cache, context=len(first.tokens))
        first.done += len(part)
        if first.left:
            mx.eval(cache.arrays())
            return hidden, None
        return self.model.logits(hidden[:, -1]), cache
