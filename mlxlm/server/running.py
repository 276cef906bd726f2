"""Running a server: sockets, signals, an orderly end."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from mlxlm.errors import UsageError
from mlxlm.server.app import make_app
from mlxlm.server.service import Service


class _Server(uvicorn.Server):
    """uvicorn's server, which ends with status 0 when it was asked to end."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM, the second one of which ends everything at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._service.stop()
            self.handle_exit(number, frame)
            if self._times:
                self.force_exit = True
            self._times += 1

        self._times = 0
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the business of the main thread
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any free one. Raises UsageError where none can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(1024)
    except (OSError, OverflowError, UnicodeError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"can't listen on {host} port {port}: {reason}; port 0 takes any free one") from None
    return found


def make_server(service: Service) -> uvicorn.Server:
    """uvicorn around a service; `run(sockets=[...])` it. It ends when its `should_exit` is set, or by a signal."""
    settings = service.settings
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        h11_max_incomplete_event_size=64 * 1024,
    )
    return _Server(config, service)


def serve(service: Service, listening: socket.socket, ready: Callable[[str], Any] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; then refuse what is new and let what runs end, for `settings.grace` seconds.

    ready: called with the address when requests are taken.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s")
    if ready is not None:
        host, port = listening.getsockname()[:2]
        ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    try:
        make_server(service).run(sockets=[listening])
    finally:
        service.close()
        listening.close()
