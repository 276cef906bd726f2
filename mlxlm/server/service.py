"""What a server has: the model, the engine, its limits, and how each request is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
import mlx.core as mx
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from mlxlm.errors import MlxlmError, UnsupportedModelError
from mlxlm.generation import Engine, EngineBusyError, EngineStatistics, embed
from mlxlm.generation.steps import check_generates
from mlxlm.server import wire
from mlxlm.server.answering import Answers
from mlxlm.server.asking import Asked
from mlxlm.server.chats import ChatForm, read_chat
from mlxlm.server.completions import CompletionForm, read_completion
from mlxlm.server.connection import EventStream, read_json, while_there
from mlxlm.server.embeddings import embedding_body, read_embedding
from mlxlm.server.metrics import Metrics
from mlxlm.server.problems import Problem, json_response
from mlxlm.server.settings import ServerSettings
from mlxlm.server.tools import shown

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

T = TypeVar("T")
# Texts that are embedded between two steps of the answers that are being made.
_EMBEDDED_AT_ONCE = 8


class Service:
    """A model behind the endpoints. `close` it in the end.

    A decoder answers and embeds; any other model embeds only.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, settings: ServerSettings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.metrics = Metrics()
        self.created = int(time.time())
        self.stopping = False
        # Some heads have more rows than the tokenizer has words.
        self.words = min(tokenizer.vocab_size, model.config.embeddings.vocab_size)
        self.engine: Engine | None = None
        self._why = ""
        self._embedding = 0
        self._worker: ThreadPoolExecutor | None = None
        try:
            check_generates(model)
            if model.config.has_memory:
                raise UnsupportedModelError("an encoder-decoder model only embeds here; it is used by mlxlm generate")
        except UnsupportedModelError as error:
            self._why = str(error)
            mx.eval(model.parameters())
            self._worker = ThreadPoolExecutor(1, "mlxlm-embedding")
        else:
            self.engine = Engine(model, self.words, max_rows=settings.max_rows, max_waiting=settings.max_waiting)

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what is being made and end the engine."""
        self.stopping = True
        if self.engine is not None:
            self.engine.close(finish=False, timeout=timeout)
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Take no more requests; those that run go on."""
        self.stopping = True

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered."""
        return not self.stopping and (self.engine is None or self.engine.running)

    def statistics(self) -> EngineStatistics | None:
        """Of the engine, None without one."""
        return None if self.engine is None else self.engine.statistics()

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        began = time.monotonic()
        body = await self._body(request, "completions")
        asked = await self._read(lambda: read_completion(body, self.tokenizer, self.settings, self.words))
        form = CompletionForm(asked, self.tokenizer)
        return await self._answer(request, form, asked, frozenset(), began)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        began = time.monotonic()
        body = await self._body(request, "chat completions")
        asked, dialect = await self._read(lambda: read_chat(body, self.tokenizer, self.settings, self.words))
        form = ChatForm(asked, self.tokenizer, dialect)
        return await self._answer(request, form, asked, shown(self.tokenizer, dialect), began)

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        deadline = time.monotonic() + self.settings.timeout
        body = await self._body(request, None)
        dim = self.model.config.dim
        asked = await self._read(lambda: read_embedding(body, self.tokenizer, self.settings, dim))
        if self._embedding >= self.settings.max_waiting + 1:
            raise Problem(429, "the server is busy: too many embeddings wait", code="queue_full", retry=1)
        self._embedding += 1
        try:
            vectors = await while_there(request.receive, self._embed(list(asked.texts), deadline))
        finally:
            self._embedding -= 1
        return json_response(embedding_body(asked, vectors, self.settings.name))

    async def _body(self, request: Request, generates: str | None) -> dict[str, Any]:
        """The body of a request to this model.  generates: what it asks for when only decoders give it."""
        body = await read_json(request, self.settings.max_body, self.settings.body_seconds)
        name = self.settings.name
        if not isinstance(body, dict):
            raise Problem(400, "the request must be a JSON object", code="invalid_value")
        if body.get("model") is None:
            raise Problem(400, "model is missing", param="model", code="missing_field")
        if body["model"] != name:
            raise Problem(
                404,
                f"there is no model {body['model']!r:.100}; this server has {name!r}",
                param="model",
                code="model_not_found",
            )
        if generates is not None and self.engine is None:
            raise Problem(400, f"this model serves no {generates}: {self._why}", param="model", code="unsupported")
        return body

    async def _read(self, work: Callable[[], T]) -> T:
        """Work that takes its time, such as making tokens of a long text, beside the event loop."""
        try:
            return await anyio.to_thread.run_sync(work)
        except MlxlmError as error:
            raise Problem(400, str(error), code="invalid_value") from None

    async def _answer(
        self, request: Request, form: wire.Form, asked: Asked, special: frozenset[int], began: float
    ) -> Response:
        assert self.engine is not None
        settings, options = self.settings, asked.options
        answers = Answers(
            self.engine,
            self.tokenizer,
            await self._read(asked.requests),
            stop=options.stop,
            deadline=began + settings.timeout,
            shown=special,
            on_first=lambda: self.metrics.first_token(time.monotonic() - began),
        )
        answers.submit()
        if options.stream:
            events = self._events(form, asked, answers)
            return EventStream(events, settings.timeout + settings.body_seconds, self._ended)
        try:
            work = wire.whole(form, asked, answers, settings.name)
            return json_response(await while_there(request.receive, work))
        finally:
            answers.cancel()

    async def _events(self, form: wire.Form, asked: Asked, answers: Answers) -> AsyncGenerator[bytes, None]:
        try:
            async for event in wire.events(form, asked, answers, self.settings.name):
                yield event
        finally:
            answers.cancel()

    def _ended(self, gone: bool) -> None:
        self.metrics.disconnected += gone

    async def _embed(self, texts: list[str], deadline: float) -> np.ndarray:
        """Vectors of texts, a few at a time so that answers being made don't wait for all of them."""
        parts = []
        for first in range(0, len(texts), _EMBEDDED_AT_ONCE):
            some = texts[first : first + _EMBEDDED_AT_ONCE]
            future = self._in_the_models_thread(lambda some=some: embed(self.model, self.tokenizer, some))  # type: ignore[misc]
            try:
                left = max(deadline - time.monotonic(), 0.001)
                with anyio.fail_after(left):
                    parts.append(await asyncio.wrap_future(future))
            except TimeoutError:
                raise Problem(504, "the embeddings took longer than this server allows", code="timeout") from None
            except MlxlmError as error:
                raise Problem(400, str(error), param="input", code="invalid_value") from None
        return np.concatenate(parts)

    def _in_the_models_thread(self, work: Callable[[], T]) -> Future[T]:
        if self._worker is not None:
            return self._worker.submit(work)
        assert self.engine is not None
        try:
            return self.engine.call(work)
        except EngineBusyError:
            raise Problem(503, "the server is not able to answer any more", code="unavailable") from None
