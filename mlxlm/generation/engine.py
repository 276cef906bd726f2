"""A model that answers many callers at once: continuous batching in a thread of its own.

    with Engine(model, words) as engine:
        handle = engine.submit(Request(tokens=(1, 2, 3), max_tokens=50))
        for choice in handle:        # TokenChoice after TokenChoice, as they are made
            ...

All work of MLX is done in the engine's thread; `submit`, `cancel` and `close` may be called from any.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from mlxlm.errors import MlxlmError, UsageError
from mlxlm.generation.requests import Completion, Request, TokenChoice
from mlxlm.generation.rows import Row
from mlxlm.generation.scheduler import Scheduler

if TYPE_CHECKING:
    from mlxlm.models import Transformer

Listener = Callable[[TokenChoice | None], None]
T = TypeVar("T")


class EngineBusyError(MlxlmError):
    """The queue of an engine is full, or the engine is closed: ask again later."""


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """What an engine does now and has done.

    waiting, active: rows that have not been let in, and that are being read or answered.  cache_bytes: of all rows.
    requests, cancelled, failed: so far, of those that ended.  prompt_tokens, generated_tokens: so far.
    """

    waiting: int
    active: int
    cache_bytes: int
    requests: int
    cancelled: int
    failed: int
    prompt_tokens: int
    generated_tokens: int


class Handle:
    """An answer in the making. Iterate over its tokens, or wait for the `result`; both may be done once.

    A handle that is given up should be cancelled, or it is answered to its end.
    """

    def __init__(self, engine: Engine, request: Request, listener: Listener | None):
        self.request = request
        self._engine = engine
        self._listener = listener
        self._tokens: queue.SimpleQueue[TokenChoice | None] = queue.SimpleQueue()
        self._choices: list[TokenChoice] = []
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._cancelled = False

    def __iter__(self) -> Iterator[TokenChoice]:
        while (choice := self._tokens.get()) is not None:
            yield choice
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Completion:
        """The whole answer, with what there is of a cancelled one. Raises TimeoutError, or what went wrong."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} s")
        if self._error is not None:
            raise self._error
        return Completion.of(self._choices, "cancelled" if self._cancelled and not self._ended() else None)

    def cancel(self) -> None:
        """Let the engine forget the request as soon as it can; what it has made stays. No effect when it is done."""
        self._engine._cancel(self)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._done.is_set()

    def _ended(self) -> bool:
        return bool(self._choices) and self._choices[-1].finish_reason is not None

    # Called by the engine's thread.

    def _give(self, choice: TokenChoice) -> None:
        self._choices.append(choice)
        self._tokens.put(choice)
        self._tell(choice)

    def _finish(self, error: BaseException | None = None) -> None:
        if self._done.is_set():
            return
        self._error = error
        self._done.set()
        self._tokens.put(None)
        self._tell(None)

    def _tell(self, choice: TokenChoice | None) -> None:
        if self._listener is None:
            return
        try:
            self._listener(choice)
        except Exception:
            # Whoever listens is gone (a closed event loop, say): nobody wants the rest, and the others must go on.
            self._listener = None
            self.cancel()


class Engine:
    """Continuous batching behind a thread. See `Scheduler` for the options and for how requests share the model.

    max_waiting: requests that may wait to be let in; one more raises EngineBusyError. Default no limit.
    """

    def __init__(self, model: Transformer, words: int, *, max_waiting: int | None = None, **options: Any):
        if max_waiting is not None and max_waiting < 0:
            raise UsageError(f"max_waiting is {max_waiting}, but must be 0 or more")
        self._scheduler = Scheduler(model, words, **options)
        # A thread can't evaluate what another one has left to be evaluated, such as constants of the layers.
        mx.eval(model.parameters(), model(mx.array([[0]])))
        self._max_waiting = max_waiting
        # Guards what follows; also wakes the thread.
        self._changed = threading.Condition()
        self._inbox: list[Handle] = []
        self._unwanted: list[Handle] = []
        self._calls: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._closing = False
        self._counts = {"requests": 0, "cancelled": 0, "failed": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self._rows: dict[Handle, Row] = {}
        self._waiting = self._active = self._cache_bytes = 0
        self._thread = threading.Thread(target=self._run, name="mlxlm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, listener: Listener | None = None) -> Handle:
        """Ask for an answer; returns at once.

        listener: called in the engine's thread with each token, and with None when nothing more will come; it must
        return quickly (for asyncio, let it call `loop.call_soon_threadsafe`).
        Raises EngineBusyError, and what `Scheduler.check` raises for a request that can't be answered.
        """
        self._scheduler.check(request)
        handle = Handle(self, request, listener)
        with self._changed:
            if self._closing:
                raise EngineBusyError("the engine is closed")
            waiting = self._waiting + len(self._inbox)
            if self._max_waiting is not None and waiting > self._max_waiting:
                raise EngineBusyError(f"{waiting} requests are waiting already; try again later")
            self._inbox.append(handle)
            self._changed.notify()
        return handle

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the engine's thread between two steps, where the model may be used for something else.

        Answers wait meanwhile, so it should be short. Raises EngineBusyError when the engine is closed.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closing:
                raise EngineBusyError("the engine is closed")
            self._calls.append((future, work))
            self._changed.notify()
        return future

    @property
    def running(self) -> bool:
        """Whether the thread is there to answer; False after `close`, and when something broke it."""
        return self._thread.is_alive()

    def statistics(self) -> EngineStatistics:
        """What the engine does now and has done."""
        with self._changed:
            return EngineStatistics(
                waiting=self._waiting + len(self._inbox),
                active=self._active,
                cache_bytes=self._cache_bytes,
                **self._counts,
            )

    def close(self, *, finish: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests; answer those there are, or cancel them when `finish` is False.

        Waits for the thread, at most `timeout` seconds; returns whether it has ended.
        """
        with self._changed:
            self._closing = True
            if not finish:
                self._unwanted += [*self._inbox, *self._rows]
                for future, _ in self._calls:
                    future.cancel()
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finish=kind is None)

    def _cancel(self, handle: Handle) -> None:
        with self._changed:
            self._unwanted.append(handle)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._exchange():
                self._step()
        except BaseException as error:  # nobody may wait for a thread that is gone
            with self._changed:
                self._closing = True
                left = [*self._inbox, *self._rows]
                calls, self._calls = self._calls, []
            for handle in left:
                handle._finish(error)
            for future, _ in calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            raise

    def _exchange(self) -> bool:
        """Take in what callers want; waits while there is nothing to do. False when the engine is to end."""
        with self._changed:
            self._report()
            while not (self._inbox or self._unwanted or self._calls or self._scheduler.busy or self._closing):
                self._changed.wait()
            arrived, self._inbox = self._inbox, []
            unwanted, self._unwanted = set(self._unwanted), []
            ended = [handle for handle in unwanted if not handle.done]
            for handle in arrived:
                if handle not in unwanted:
                    (self._rows[handle],) = self._scheduler.add(handle.request, handle)
            self._scheduler.drop([self._rows.pop(handle) for handle in ended if handle in self._rows])
            self._counts["cancelled"] += len(ended)
            self._counts["requests"] += len(ended)
            self._report()
            calls, self._calls = self._calls[:1], self._calls[1:]
            going_on = self._scheduler.busy or self._calls or not self._closing
        for handle in ended:
            handle._cancelled = True
            handle._finish()
        for future, work in calls:
            self._do(future, work)
        return bool(going_on)

    @staticmethod
    def _do(future: Future[Any], work: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:  # of the work, and for whoever asked for it
            future.set_exception(error)

    def _report(self) -> None:
        self._waiting, self._active = self._scheduler.waiting, self._scheduler.active
        self._cache_bytes = self._scheduler.cache_bytes

    def _step(self) -> None:
        try:
            made = self._scheduler.step()
        except MlxlmError as error:
            # Such as weights that give no numbers: whoever is part of the batch can't be answered, others may.
            failed = self._scheduler.abandon()
            with self._changed:
                self._counts["failed"] += len(failed)
                self._counts["requests"] += len(failed)
                for row in failed:
                    self._rows.pop(row.owner, None)
            for row in failed:
                row.owner._finish(error)
            return
        for row, choice in made:
            if row.error is None:
                row.owner._give(choice)
        ended = [row for row, choice in made if choice.finish_reason is not None]
        with self._changed:
            self._counts["generated_tokens"] += len(made)
            self._counts["requests"] += len(ended)
            self._counts["failed"] += sum(row.error is not None for row in ended)
            self._counts["prompt_tokens"] += sum(len(row.request.tokens) for row in ended)
            for row in ended:
                self._rows.pop(row.owner, None)
        for row in ended:
            row.owner._finish(row.error)
