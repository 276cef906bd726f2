"""Limits: queues, sizes, times, keys, hosts; clients that leave; the end of a server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from small_server import events, idle, served

from mlxlm.errors import UsageError
from mlxlm.server import ServerSettings
from mlxlm.server.running import listen


def body(**more):
    return {"model": "small", "prompt": "hello", "temperature": 0, "max_tokens": 3000, **more}


@contextlib.contextmanager
def streaming(client, **more):
    """A stream that has begun."""
    with client.stream("POST", "/v1/completions", json=body(stream=True, **more)) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def test_a_full_queue_is_429_and_says_when_to_come_again(small):
    with (
        served(*small, max_rows=1, max_waiting=0) as service,
        httpx.Client(base_url=service.url) as client,
        streaming(client),
    ):
        waiting = threading.Thread(
            target=lambda: httpx.post(f"{service.url}/v1/completions", json=body(max_tokens=2), timeout=60)
        )
        waiting.start()
        while not service.statistics().waiting:
            time.sleep(0.005)
        response = client.post("/v1/completions", json=body(max_tokens=2))
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
    waiting.join(20)
    assert not waiting.is_alive()


def test_who_leaves_a_stream_frees_its_row(service, client):
    before = idle(service).cancelled
    with streaming(client):
        figures = service.statistics()
        assert figures.active + figures.waiting == 1
    figures = idle(service)
    assert figures.cancelled == before + 1
    assert figures.cache_bytes == 0


def test_who_leaves_while_waiting_for_a_whole_answer_frees_its_row(service):
    before = idle(service).cancelled
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{service.url}/v1/completions", json=body(n=3), timeout=0.3)
    assert idle(service).cancelled == before + 3
    assert service.metrics.disconnected >= 1


def test_who_reads_too_slowly_is_given_up(small):
    with served(*small, timeout=0.5, body_seconds=0.5) as service:
        port = int(service.url.rpartition(":")[2])
        text = json.dumps(body(stream=True, logprobs=5, n=4)).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.connect(("127.0.0.1", port))
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
            time.sleep(0.2)
            figures = idle(service)
        assert figures.active == 0


def test_a_request_that_takes_too_long_ends_with_an_error(small):
    with served(*small, timeout=0.3) as service, httpx.Client(base_url=service.url) as client:
        response = client.post("/v1/completions", json=body())
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        with client.stream("POST", "/v1/completions", json=body(stream=True)) as stream:
            last = events(stream)[-1]
        assert last["error"]["code"] == "timeout"
        assert idle(service).active == 0


def test_requests_that_are_too_large_or_never_come_are_refused(small):
    with served(*small, max_body=300, body_seconds=0.3, max_prompt_tokens=20) as service:
        large = json.dumps(body(prompt="a" * 400)).encode()
        headers = {"content-type": "application/json"}
        for content in (large, iter([large])):  # with its length, and in chunks
            response = httpx.post(f"{service.url}/v1/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        response = httpx.post(f"{service.url}/v1/completions", json=body(prompt="a" * 21, max_tokens=1))
        assert response.json()["error"]["code"] == "context_length_exceeded"
        long = {"model": "small", "input": ["a" * 21]}
        assert httpx.post(f"{service.url}/v1/embeddings", json=long).json()["error"]["param"] == "input"
        with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), 10) as half:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            half.sendall(f"{head}Content-Length: 99\r\n\r\n{{".encode())
            assert b" 408 " in half.recv(4096)


def test_a_key_is_asked_for_everywhere_but_at_the_page_and_health(small):
    with served(*small, api_key="a-secret-key") as service, httpx.Client(base_url=service.url) as client:
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
        for wrong in ("Bearer a-secret-ke", "Bearer a-secret-keyy", "Basic a-secret-key", "Bearer \xe9", ""):
            answer = client.get("/v1/models", headers={"Authorization": wrong.encode("latin-1")})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        headers = {"Authorization": "Bearer a-secret-key"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.post("/v1/completions", json=body(max_tokens=1), headers=headers).status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200


def test_other_host_names_are_refused(client):
    assert client.get("/health", headers={"Host": "evil.example:8080"}).status_code == 403
    assert client.get("/health", headers={"Host": ""}).status_code in (400, 403)
    assert client.get("/health", headers={"Host": "LOCALHOST:1"}).status_code == 200


def test_settings_and_ports_are_checked():
    for wrong in ({"max_rows": 0}, {"timeout": 0}, {"grace": float("nan")}, {"api_key": "short"}, {"max_body": 0}):
        with pytest.raises(UsageError):
            ServerSettings(name="x", **wrong)
    assert "secret-key" not in repr(ServerSettings(name="x", api_key="secret-key"))
    with listen("127.0.0.1", 0) as taken, pytest.raises(UsageError, match=r"can't listen.*port 0 takes"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError, match="can't listen"):
        listen("no.such.host.invalid", 1)


def test_a_terminated_server_finishes_what_runs_and_exits_with_0(small_directory):
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "mlxlm", "serve", "--model", small_directory, "--port", "0", "--grace", "20"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stderr.readline()
        url = line.split(" at ")[1].split()[0]
        with httpx.Client(base_url=url, timeout=30) as client:
            with streaming(client, max_tokens=300) as lines:
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.stderr.close()
