"""A server under load: many requests at once, of which some are given up, malformed or read slowly.

    python tools/benchmarks/serving.py                    # 1,000 requests, 64 at once, the shipped model
    python tools/benchmarks/serving.py --requests 60 --at-once 16 --model DIRECTORY

The server runs in this process on a loopback port; every request has an end, so has the run. Kinds of requests: answers
as a whole and streamed; clients that leave while they wait ("left") or in the middle of a stream ("quit"), that read
slowly ("slow") or send slowly ("trickle"); bodies that are malformed, too large or cut off. What must hold, or the exit
status is 1: greedy answers are those of `mlxlm.generate`, malformed bodies are refused with 400, 413 or 415, a full
queue says 429, every client that quits is noticed, and afterwards no row, no cache and no request is left, and memory
is where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx

import mlxlm  # before mlx.core, which is imported below where it is used, so that a fast BLAS can be loaded
from mlxlm.server import ServerSettings, Service
from mlxlm.server.running import listen, make_server

KINDS = {"whole": 36, "stream": 26, "left": 8, "quit": 8, "slow": 6, "trickle": 6, "malformed": 10}
MALFORMED = (b"", b"{", b"[1]", b'{"model": "m", "prompt": 3}', b'{"model": "m", "prompt": "a", "x": 1}', b"\xff")
# Seconds after which a client that was sent away asks again; the server says one.
AGAIN = (0.5, 1.5)
# Of answers that are given up: so long, and without an end of their own, that nobody gets one whole.
UNWANTED = 400


@dataclass
class Outcome:
    """What came of all requests. Seconds of those that were answered whole.

    endless: a bias that leaves an answer without an end.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    endless: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """A prompt and the greedy answer to it."""

    prompt: str
    text: str
    tokens: int


def expected(model, tokenizer, count: int, tokens: int) -> list[Expected]:
    """Prompts of various lengths with the answers that the library gives one at a time."""
    drawn = random.Random(0)
    words = ["import", " os", "\n", "def", " a", "(x)", ":", " return", " x", " for", " in", "  "]
    found = []
    for _ in range(count):
        prompt = "".join(drawn.choices(words, k=drawn.randint(1, 60)))
        limit = drawn.randint(1, tokens)
        found.append(Expected(prompt, mlxlm.generate(model, tokenizer, prompt, max_tokens=limit), limit))
    return found


async def ask(client: httpx.AsyncClient, one: Expected, kind: str, dice: random.Random, outcome: Outcome) -> None:
    """One request of a kind; asks again after a while as long as the queue is full."""
    if kind == "malformed":
        await spoil(client, dice, outcome)
        return
    body = {"model": "m", "prompt": one.prompt, "max_tokens": one.tokens, "temperature": 0}
    if kind in ("left", "quit"):
        body |= {"max_tokens": UNWANTED, "logit_bias": outcome.endless}
    for _ in range(1000):
        began = time.perf_counter()
        if kind == "left":
            status, text = await leave(client, body, dice), ""
        elif kind in ("whole", "trickle"):
            status, text = await whole(client, body, kind, dice)
        else:
            status, text = await stream(client, body, kind, dice, began, outcome)
        if status == 200:
            break
        outcome.counts[f"status {status}"] += 1
        if status != 429:
            outcome.wrong.append(f"{kind}: status {status}")
            return
        await asyncio.sleep(dice.uniform(*AGAIN))
    else:
        outcome.wrong.append(f"{kind}: never let in")
        return
    if kind in ("whole", "stream"):
        outcome.whole.append(time.perf_counter() - began)
    if kind not in ("left", "quit") and text != one.text:
        outcome.wrong.append(f"{kind}: {one.prompt!r} gave {text!r}, not {one.text!r}")


async def spoil(client: httpx.AsyncClient, dice: random.Random, outcome: Outcome) -> None:
    """A body that is no request: malformed, too large, not said to be JSON, or cut off."""
    content = dice.choice([*MALFORMED, b"x" * 300_000, "no JSON", "cut off"])
    if content == "cut off":
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n{")
        await writer.drain()
        writer.close()
        return
    kind = "text/plain" if content == "no JSON" else "application/json"
    answer = await client.post("/v1/completions", content=content, headers={"Content-Type": kind})
    if answer.status_code not in (400, 413, 415):
        outcome.wrong.append(f"malformed body {content[:40]!r}: status {answer.status_code}")


async def leave(client: httpx.AsyncClient, body: dict, dice: random.Random) -> int:
    """The status, 200 for a client that left without one."""
    try:
        answer = await asyncio.wait_for(client.post("/v1/completions", json=body), dice.uniform(0.005, 0.5))
    except (asyncio.TimeoutError, httpx.HTTPError):
        return 200
    return answer.status_code


async def whole(client: httpx.AsyncClient, body: dict, kind: str, dice: random.Random) -> tuple[int, str]:
    """Status and text of an answer that is not streamed; a client that trickles sends its body piece by piece."""
    content = json.dumps(body).encode()

    async def trickling() -> AsyncIterator[bytes]:
        for place in range(0, len(content), 16):
            yield content[place : place + 16]
            await asyncio.sleep(dice.uniform(0, 0.05))

    sent = trickling() if kind == "trickle" else content
    answer = await client.post("/v1/completions", content=sent, headers={"Content-Type": "application/json"})
    return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""


async def stream(
    client: httpx.AsyncClient, body: dict, kind: str, dice: random.Random, began: float, outcome: Outcome
) -> tuple[int, str]:
    """Status and text of a streamed answer; a slow client takes its time between two events, another quits."""
    text, first, ended, enough = "", True, False, dice.randint(1, 6)
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            return answer.status_code, ""
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                break
            if first and kind == "stream":
                outcome.first_token.append(time.perf_counter() - began)
            first = False
            text += json.loads(line[6:])["choices"][0]["text"]
            if kind == "slow":
                await asyncio.sleep(dice.uniform(0, 0.05))
            enough -= 1
            if kind == "quit" and enough <= 0:
                outcome.counts["quit in the middle"] += 1
                return 200, text
    return 200, text if ended else text + " (cut off)"


async def storm(
    url: str, answers: list[Expected], requests: int, at_once: int, seed: int, endless: dict[str, float]
) -> Outcome:
    """All requests, so many at once."""
    outcome, slots = Outcome(endless=endless), asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once // 2)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one(number: int) -> None:
            async with slots:
                own = random.Random(seed * 1_000_003 + number)
                kind = own.choices(list(KINDS), list(KINDS.values()))[0]
                outcome.counts[kind] += 1
                await ask(client, own.choice(answers), kind, own, outcome)

        await asyncio.gather(*(one(number) for number in range(requests)))
    return outcome


def idle(service: Service, seconds: float = 30) -> str | None:
    """What is left to do after so many seconds; None for nothing."""
    end = time.monotonic() + seconds
    while True:
        left = service.statistics()
        if not (left.active or left.waiting or left.cache_bytes or service.metrics.running):
            return None
        if time.monotonic() > end:
            return f"{left}, {service.metrics.running} requests"
        time.sleep(0.02)


def resident() -> float:
    """Memory of this process now, MB; its peak where the system doesn't say."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def percentiles(name: str, seconds: list[float]) -> str:
    """A line of figures."""
    ordered = sorted(seconds) or [0.0]
    shown = ", ".join(f"p{p} {ordered[min(len(ordered) * p // 100, len(ordered) - 1)]:.3f}" for p in (50, 90, 99))
    return f"{name}: {shown}, longest {ordered[-1]:.3f} s ({len(seconds)})"


def run(model, tokenizer, *, requests: int, at_once: int, tokens: int, prompts: int, rows: int, seed: int) -> list[str]:
    """Everything, with figures on stdout. Returns what went wrong."""
    answers = expected(model, tokenizer, prompts, tokens)
    settings = ServerSettings(name="m", max_rows=rows, max_waiting=at_once // 2, max_choices=1, max_body=200_000)
    service, listening = Service(model, tokenizer, settings), listen("127.0.0.1", 0)
    server = make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    wrong = []
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        # What is made once (compiled steps, pools of the allocator) is no leak.
        endless = dict.fromkeys(map(str, tokenizer.stop_ids), -100.0)
        asyncio.run(storm(url, answers, max(at_once, requests // 4), at_once, seed + 1, endless))
        idle(service)
        gone_before = service.metrics.disconnected
        before, active_before = figures()
        began = time.perf_counter()
        outcome = asyncio.run(storm(url, answers, requests, at_once, seed, endless))
        seconds = time.perf_counter() - began
        left = idle(service)
        after, active_after = figures()
        wrong += outcome.wrong + ([f"left over: {left}"] if left else [])
        gone = service.metrics.disconnected - gone_before
        if gone < outcome.counts["quit in the middle"]:
            wrong.append(f"{outcome.counts['quit in the middle']} clients quit, {gone} were noticed")
        if active_after > active_before + 4:
            wrong.append(f"arrays grew from {active_before:.1f} to {active_after:.1f} MB")
        if after > before + 64:
            wrong.append(f"resident memory grew from {before:.0f} to {after:.0f} MB")
        end = service.statistics()
        print(f"{requests} requests, {at_once} at once, {rows} rows, in {seconds:.1f} s: {dict(outcome.counts)}")
        print(percentiles("first token of streams", outcome.first_token))
        print(percentiles("whole answers", outcome.whole))
        print(f"resident {before:.0f} -> {after:.0f} MB, arrays {active_before:.2f} -> {active_after:.2f} MB")
        print(f"engine: {end}; clients that left and were noticed: {gone}")
    finally:
        server.should_exit = True
        thread.join(60)
        service.close()
        listening.close()
    return wrong


def figures() -> tuple[float, float]:
    """MB of the process and of MLX's arrays, once what can be freed is freed."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()
    return resident(), mx.get_active_memory() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(mlxlm.__file__).parent / "shipped" / "python-stdlib"))
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer that is checked")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model, tokenizer = mlxlm.load(given.model)
    options = {name: getattr(given, name) for name in ("requests", "at_once", "rows", "tokens", "prompts", "seed")}
    wrong = run(model, tokenizer, **options)
    for line in wrong[:20]:
        print(f"WRONG: {line}", file=sys.stderr)
    print("all answers right, nothing left over" if not wrong else f"{len(wrong)} things went wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
