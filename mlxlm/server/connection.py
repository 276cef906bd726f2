"""One connection's request and response: bodies of bounded size, clients that leave, streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlxlm.server.problems import Problem

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody is there any more to read the response."""


async def read_json(request: Request, limit: int, seconds: float) -> Any:
    """The body of a request.

    Raises Problem: 415 unless it says that it is JSON (so that a browser asks before it sends one from another site),
    413 for more than `limit` bytes, 408 when it isn't there within `seconds`, 400 for what is no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(415, "the body must be JSON: send Content-Type: application/json", code="unsupported_media_type")
    too_large = Problem(413, f"the request is larger than {limit} bytes", code="request_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdigit() and int(stated[:20]) > limit:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    try:
        with anyio.fail_after(seconds):
            body = await read()
    except TimeoutError:
        raise Problem(408, f"the request was not complete within {seconds:g} s", code="timeout") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return parse_json(body)


def parse_json(body: bytes) -> Any:
    """JSON of a request. Raises Problem for anything else, such as NaN."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise Problem(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise Problem(400, f"the body is not valid JSON: {error}"[:300], code="invalid_json") from None


async def while_there(receive: Receive, work: Awaitable[T], seconds: float | None = None) -> T:
    """The result of work on a request whose body was read.

    Cancels it and raises ClientGoneError as soon as the client is gone, or after so many seconds.
    """

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, as they come.

    events: closed whatever happens.  seconds: after which a client that reads too slowly is given up.
    ended: called at the end, with whether the client had left.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], seconds: float, ended: Callable[[bool], None]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._seconds, self._ended = events, seconds, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        gone = True
        try:
            with contextlib.suppress(ClientGoneError, OSError):
                await while_there(receive, run(), self._seconds)
                gone = False
        finally:
            await self._events.aclose()
            self._ended(gone)
