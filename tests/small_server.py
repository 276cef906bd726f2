"""A server in a thread, and what tests ask of it."""

from __future__ import annotations

import contextlib
import json
import threading
import time

from mlxlm.server import ServerSettings, Service
from mlxlm.server.running import listen, make_server


@contextlib.contextmanager
def served(model, tokenizer, **settings):
    """A service that is reached at `service.url` while the block runs."""
    service = Service(model, tokenizer, ServerSettings(**{"name": "small", "grace": 2.0, **settings}))
    listening = listen("127.0.0.1", 0)
    server = make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    service.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        yield service
    finally:
        server.should_exit = True
        thread.join(20)
        service.close()
        listening.close()
        assert not thread.is_alive()


def idle(service):
    """The engine's statistics once nothing is left to do."""
    for _ in range(500):
        figures = service.statistics()
        if not figures.active and not figures.waiting and not service.metrics.running:
            return figures
        time.sleep(0.01)
    raise AssertionError(figures)


def events(response):
    """The data of server-sent events, read to the end."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) if line != "data: [DONE]" else "DONE" for line in lines]
