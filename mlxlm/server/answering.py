"""Answers in the making, as asyncio sees them: pieces of text out of the tokens that the engine's thread makes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from mlxlm.errors import MlxlmError
from mlxlm.generation import Engine, EngineBusyError, Handle, Request, TokenChoice
from mlxlm.generation.stopping import StopStrings
from mlxlm.server.problems import Problem
from mlxlm.tokenizers import Tokenizer

# Stands for the index of an answer in the message that the time is over.
_LATE = -1


@dataclass
class AnswerPiece:
    """New text of one answer.

    index: of the answer.  choices: tokens behind it, without the stop token.  finish_reason: with the last piece only.
    """

    index: int
    text: str
    choices: list[TokenChoice]
    finish_reason: str | None


@dataclass
class _Text:
    """What turns the tokens of one answer into text.  shown: special tokens that are text here."""

    tokenizer: Tokenizer
    stops: StopStrings
    shown: frozenset[int]
    started: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._detokenizer = self.tokenizer.detokenizer(skip_special_tokens=False)
        self._hidden = self.tokenizer.special_ids - self.shown

    def add(self, choice: TokenChoice) -> tuple[str, str | None]:
        """The text that is certain with this token, and the reason when it is the last."""
        reason: str | None = choice.finish_reason
        text = ""
        if reason != "stop" and choice.token not in self._hidden:
            text = self.stops.add(self._detokenizer.add(choice.token))
        if self.stops.stopped:
            return text, "stop"
        if reason is not None:
            text += self.stops.add(self._detokenizer.finish())
            if self.stops.stopped:
                return text, "stop"
            text += self.stops.finish()
        return text, reason


class Answers:
    """The answers to one HTTP request: `submit` it, read its `pieces`, and `cancel` it in any case in the end.

    deadline: by `time.monotonic`, after which `pieces` raises a Problem.  shown: special tokens that are text here.
    on_first: called when the first token is there.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: list[Request],
        *,
        stop: tuple[str, ...] = (),
        deadline: float,
        shown: frozenset[int] = frozenset(),
        on_first: Callable[[], None] | None = None,
    ):
        self._engine = engine
        self._requests = requests
        self._deadline = deadline
        self._on_first = on_first
        self._texts = [_Text(tokenizer, StopStrings(stop), shown) for _ in requests]
        self._heard: asyncio.Queue[tuple[int, TokenChoice | None]] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        self._handles: list[Handle] = []
        self._left = set(range(len(requests)))
        self.generated_tokens = 0

    def submit(self) -> None:
        """Ask the engine. Must be called in the event loop that reads the pieces.

        Raises a Problem, with status 429 when the engine's queue has no room for all answers.
        """
        loop = asyncio.get_running_loop()
        # A message among the others: waiting with a time limit loses a cancellation that meets a token (Python < 3.12).
        left = self._deadline - time.monotonic()
        self._timer = loop.call_later(left, self._heard.put_nowait, (_LATE, None))
        try:
            for index, request in enumerate(self._requests):

                def listen(choice: TokenChoice | None, index: int = index) -> None:
                    loop.call_soon_threadsafe(self._heard.put_nowait, (index, choice))

                self._handles.append(self._engine.submit(request, listen))
        except EngineBusyError as error:
            self.cancel()
            if not self._engine.running:
                raise Problem(503, "the server is not able to answer any more", code="unavailable") from None
            raise Problem(429, f"the server is busy: {error}", code="queue_full", retry=1) from None
        except MlxlmError as error:
            self.cancel()
            raise Problem(400, str(error), code="invalid_prompt") from None

    def cancel(self) -> None:
        """Let the engine forget what is not done."""
        if self._timer is not None:
            self._timer.cancel()
        for handle in self._handles:
            if not handle.done:
                handle.cancel()

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """All pieces of all answers, as they are made. The last of each has a finish_reason."""
        while self._left:
            index, choice = await self._heard.get()
            if index == _LATE:
                raise Problem(504, "the answer took longer than this server allows", code="timeout")
            if index not in self._left:
                continue  # made after a stop string, before the engine heard that nobody wants it
            if choice is None:
                raise self._broken(index)
            if not self.generated_tokens and self._on_first is not None:
                self._on_first()
            self.generated_tokens += 1
            text, reason = self._texts[index].add(choice)
            if reason is not None:
                self._left.discard(index)
                self._handles[index].cancel()
            choices = [] if choice.finish_reason == "stop" else [choice]
            yield AnswerPiece(index, text, choices, reason)

    def _broken(self, index: int) -> Problem:
        """What ended an answer that has no last token."""
        try:
            self._handles[index].result(0)
        except MlxlmError as error:
            return Problem(500, str(error), code="model_error")
        except Exception as error:
            return Problem(500, f"the model failed: {type(error).__name__}", code="model_error")
        return Problem(503, "the server is shutting down", code="shutting_down", retry=5)
