"""The endpoints, and what stands before all of them: host names, keys, counting."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxlm.server.connection import ClientGoneError
from mlxlm.server.metrics import CONTENT_TYPE
from mlxlm.server.problems import Problem, json_response
from mlxlm.server.service import Service

# What the page may load: nothing but itself and this server.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# Served without a key: the page holds no secret and asks for the key itself.
_OPEN = ("/", "/health")


def make_app(service: Service) -> Starlette:
    """The ASGI application of a service."""
    settings = service.settings
    page = resources.files("mlxlm.server").joinpath("page.html").read_bytes()

    async def home(request: Request) -> Response:
        return Response(page, headers=_PAGE_HEADERS, media_type="text/html")

    async def health(request: Request) -> Response:
        if service.healthy:
            return json_response({"status": "ok"})
        return json_response({"status": "stopping" if service.stopping else "broken"}, 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(service.statistics()), headers={"Content-Type": CONTENT_TYPE})

    entry = {
        "id": settings.name,
        "object": "model",
        "created": service.created,
        "owned_by": "mlxlm",
        # Ours, for the page: what the model can be asked for.
        "generates": service.engine is not None,
        "chats": service.engine is not None and service.tokenizer.chat_template is not None,
    }

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != settings.name:
            raise Problem(404, f"there is no such model; this server has {settings.name!r}", code="model_not_found")
        return json_response(entry)

    routes = [
        Route("/", home),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", _while_serving(service, service.completion), methods=["POST"]),
        Route("/v1/chat/completions", _while_serving(service, service.chat), methods=["POST"]),
        Route("/v1/embeddings", _while_serving(service, service.embeddings), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {Problem: _problem, HTTPException: _http, ClientGoneError: _gone, Exception: _crash}
    names = [route.path for route in routes]
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(Gate, service, names)])


def _while_serving(
    service: Service, endpoint: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        if service.stopping:
            raise Problem(503, "the server is shutting down", code="shutting_down", retry=5)
        try:
            return await endpoint(request)
        except ClientGoneError:
            service.metrics.disconnected += 1
            raise

    return serve


async def _problem(request: Request, problem: Problem) -> Response:
    return problem.response()


async def _http(request: Request, error: HTTPException) -> Response:
    what = {404: f"there is no {request.url.path[:100]} here", 405: f"{request.method} is not allowed here"}
    response = Problem(error.status_code, what.get(error.status_code, error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: ClientGoneError) -> Response:
    return Response(status_code=499)  # nobody reads it; the number is what logs know for it


async def _crash(request: Request, error: Exception) -> Response:
    return Problem(500, "the server failed on this request; its log says more", code="internal_error").response()


class Gate:
    """Lets in what may come in, and counts what goes out."""

    def __init__(self, app: ASGIApp, service: Service, routes: list[str]):
        self._app, self._service, self._routes = app, service, set(routes)
        key = service.settings.api_key
        self._key = None if key is None else key.encode()
        self._hosts = {host.lower() for host in service.settings.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, began, statuses = self._service.metrics, time.monotonic(), []

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        path = scope["path"]
        route = path if path in self._routes else "/v1/models/{name}" if path.startswith("/v1/models/") else "other"
        metrics.running += 1
        try:
            problem = self._refusal(scope)
            if problem is not None:
                await problem.response()(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            metrics.running -= 1
            metrics.responded(route, statuses[0] if statuses else 499, time.monotonic() - began)

    def _refusal(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        if "*" not in self._hosts and _host(headers.get("host", "")) not in self._hosts:
            return Problem(
                403, "this server does not answer to that host name (see --allowed-host)", code="host_not_allowed"
            )
        if self._key is None or scope["path"] in _OPEN:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "replace")
        if scheme.lower() == "bearer" and hmac.compare_digest(given, self._key):
            return None
        return Problem(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() else header).lower()
