"""Counters of a server in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from mlxlm.generation import EngineStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper ends of the classes of a histogram, seconds.
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """How often something took how long."""

    def __init__(self) -> None:
        self._classes = [0] * (len(_BOUNDS) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self._classes[next((i for i, bound in enumerate(_BOUNDS) if seconds <= bound), len(_BOUNDS))] += 1
        self._total += seconds

    def lines(self, name: str, labels: str = "") -> Iterable[str]:
        """Its lines; labels: as written between braces, without them."""
        before, alone = (f"{labels}," if labels else ""), (f"{{{labels}}}" if labels else "")
        count = 0
        for bound, number in zip((*map(str, _BOUNDS), "+Inf"), self._classes, strict=True):
            count += number
            yield f'{name}_bucket{{{before}le="{bound}"}} {count}'
        yield f"{name}_sum{alone} {self._total}"
        yield f"{name}_count{alone} {count}"


class Metrics:
    """What a server has done. Used in the event loop alone."""

    def __init__(self) -> None:
        self.running = 0
        self.disconnected = 0
        self._responses: Counter[tuple[str, int]] = Counter()
        self._seconds: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._first_token = Histogram()

    def responded(self, route: str, status: int, seconds: float) -> None:
        """Count a response.  route: one of the server's, never a path that a client made up."""
        self._responses[route, status] += 1
        self._seconds[route].observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Count the time from a request's arrival to the first token of its answer."""
        self._first_token.observe(seconds)

    def text(self, engine: EngineStatistics | None) -> str:
        """All of them.  engine: None where the model only embeds."""
        lines = []

        def add(name: str, kind: str, description: str, samples: Iterable[str]) -> None:
            lines.extend([f"# HELP mlxlm_{name} {description}", f"# TYPE mlxlm_{name} {kind}", *samples])

        responses = [
            f'mlxlm_http_responses_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self._responses.items())
        ]
        add("http_responses_total", "counter", "Responses by route and status.", responses)
        name = "mlxlm_http_response_seconds"
        times = [line for route, one in sorted(self._seconds.items()) for line in one.lines(name, f'route="{route}"')]
        add("http_response_seconds", "histogram", "From a request's arrival to the end of its response.", times)
        first = self._first_token.lines("mlxlm_first_token_seconds")
        add("first_token_seconds", "histogram", "From a request's arrival to the first token of its answer.", first)
        add("http_requests_running", "gauge", "Requests being served.", [f"mlxlm_http_requests_running {self.running}"])
        gone = [f"mlxlm_clients_gone_total {self.disconnected}"]
        add("clients_gone_total", "counter", "Clients that left before they had their answer.", gone)
        if engine is not None:
            self._add_engine(engine, add)
        return "\n".join(lines) + "\n"

    @staticmethod
    def _add_engine(engine: EngineStatistics, add) -> None:  # type: ignore[no-untyped-def]
        gauges = {"waiting": "Answers that wait to be begun.", "active": "Answers being made."}
        for field, description in {**gauges, "cache_bytes": "Bytes of keys and values held."}.items():
            add(f"engine_{field}", "gauge", description, [f"mlxlm_engine_{field} {getattr(engine, field)}"])
        counters = {
            "requests": "Answers that ended.",
            "cancelled": "Answers that nobody wanted any more.",
            "failed": "Answers that the model could not give.",
            "prompt_tokens": "Tokens of prompts that were answered.",
            "generated_tokens": "Tokens made.",
        }
        for field, description in counters.items():
            name = f"engine_{field}_total"
            add(name, "counter", description, [f"mlxlm_{name} {getattr(engine, field)}"])
