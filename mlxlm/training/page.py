"""One HTML page that compares runs: curves as inline SVG and a table, without a script or anything from a network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from mlxlm.checkpoint import write_bytes_atomic
from mlxlm.training.curves import CURVES, Run

# Colours that people with red-green blindness can tell apart (Okabe and Ito 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a7a00")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 320, 70, 36, 14, 26
_MAX_POINTS = 2000
_MARKED = 30  # lines of at most so many points show each of them
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:1360px;padding:0 1em;color:#222}"
    "figure{display:inline-block;margin:1.5em 1em 0 0}figcaption{font-weight:600;margin-bottom:.4em}"
    "svg{max-width:100%;height:auto}"
    "svg text{font:11px system-ui,sans-serif;fill:#444}"
    "table{border-collapse:collapse}th,td{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}"
)
_COLUMNS = {
    "step": "steps",
    "loss": "training loss",
    "valid_loss": "validation loss",
    "perplexity": "perplexity",
    "tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "memory": "peak memory, GB",
}


def write_page(runs: Sequence[Run], path: str | Path) -> Path:
    """Write the page, whole or not at all; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, page(runs).encode("utf-8"))
    return path


def page(runs: Sequence[Run]) -> str:
    """The page's HTML: a chart for each curve that any run has, and a table of the last values."""
    figures = []
    for key, title in CURVES.items():
        lines = [(number, run.curves[key]) for number, run in enumerate(runs) if key in run.curves]
        if lines:
            figures.append(f"<figure><figcaption>{title}</figcaption>{chart(lines)}</figure>")
    head = "".join(f"<th>{title}</th>" for title in ("run", *_COLUMNS.values()))
    rows = "".join(_row(number, run) for number, run in enumerate(runs))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Training runs</title>'
        f"<style>{_STYLE}</style></head><body><h1>Training runs</h1>"
        f"<table><tr>{head}</tr>{rows}</table>{''.join(figures)}</body></html>\n"
    )


def _row(number: int, run: Run) -> str:
    cells = []
    for key in _COLUMNS:
        value = run.last.get(key)
        if value is None:
            cells.append("<td></td>")
        elif key == "memory":
            cells.append(f"<td>{value / 1e9:.2f}</td>")
        else:
            cells.append(f"<td>{_number(value, 5)}</td>")
    name = f'<span style="color:{_colour(number)}">●</span> {html.escape(run.name)}'
    return f"<tr><td>{name}</td>{''.join(cells)}</tr>"


def chart(lines: Sequence[tuple[int, Sequence[tuple[int, float]]]]) -> str:
    """An SVG of some lines, each the number of its run (for its colour) and its (step, value) points."""
    steps = [step for _, points in lines for step, _ in points]
    values = [value for _, points in lines for _, value in points]
    across, up = _ticks(min(steps), max(steps)), _ticks(min(values), max(values))
    x0, x1 = min(across[0], min(steps)), max(across[-1], max(steps))
    y0, y1 = min(up[0], min(values)), max(up[-1], max(values))

    def x(step: float) -> float:
        return _LEFT + (step - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (y1 - value) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">']
    for value in up:
        parts.append(f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_number(value, 4)}</text>')
    for step in across:
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{_number(step, 6)}</text>')
    for number, points in lines:
        colour = _colour(number)
        if len(points) <= _MARKED:
            parts += [
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>' for step, value in points
            ]
        if len(points) == 1:
            continue
        stride = -(-len(points) // _MAX_POINTS)
        shown = [*points[:-1:stride], points[-1]]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in shown)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high; never a range of zero."""
    if high <= low:
        room = abs(low) * 0.05 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / unit)
    return [number * unit for number in range(first, math.ceil(high / unit - 1e-9) + 1)]


def _number(value: float, digits: int) -> str:
    if abs(value) < 10**12 and (value == int(value) or abs(value) >= 10 ** (digits - 1)):
        return f"{round(value):,}"
    return f"{value:.{digits}g}"


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
