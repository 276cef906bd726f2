"""Time and peak memory of attention, forward and backward: the tiled path against what MLX has. One command, one table:

    python tools/benchmarks/attention.py                        # 32 heads of 64, bfloat16, lengths 1k to 32k: for a GPU
    python tools/benchmarks/attention.py --quick                # 4 heads, float32, short: a minute on a CPU
    python tools/benchmarks/attention.py --cases causal alibi --lengths 8192 16384

Each row runs in a process of its own. "theirs" is mx.fast with an array mask, or where that has no such gradient (MLX
0.32 on CUDA: additive masks; everywhere: soft-cap) plain MLX operations, marked with *. Both run inside mx.compile, as
a training step does. Times are medians; GB is what a pass holds on top of its inputs at its peak; growth is that of the
row with half the length. GPU backends run ahead of the device and keep the buffers of many blocks, so ours runs under
the memory limit that the planner gives (`planned_bytes`); --memory-limit sets another, in GB, and 0 none. "first" is
the first pass: building the graph, compiling kernels, running. A dash: the dense computation was estimated to need more
than --dense-limit, or the process ended without a result, which is said below the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxlm.kernels import AttentionMask

ROOT = Path(__file__).resolve().parents[2]
GB = 1e9
DOCUMENT = 1000  # tokens of a packed document
WINDOW = 1024
CASES = ("causal", "segments", "window", "alibi", "relative", "softcap", "plain", "lengths")
SHOWN = CASES[:6]
ADDITIVE = ("alibi", "relative")
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------ one row, in its own process


def arguments_of(case: str, heads: int, length: int) -> tuple[AttentionMask, dict[str, Any]]:
    """The mask of a case and its other arguments."""
    import mlx.core as mx

    from mlxlm.kernels import AttentionMask

    mask = AttentionMask(causal=case not in ("plain", "lengths", "relative"))
    given: dict[str, Any] = {}
    if case == "segments":
        ids = (mx.arange(length) // DOCUMENT)[None]
        mask = AttentionMask(causal=True, query_segments=ids, key_segments=ids)
    elif case == "window":
        mask = AttentionMask(causal=True, window=WINDOW)
    elif case == "lengths":
        mask = AttentionMask(key_lengths=mx.array([length * 3 // 4]))
    elif case == "alibi":
        given["alibi_slopes"] = 2.0 ** -(8.0 / heads * mx.arange(1, heads + 1))
    elif case == "relative":
        given["relative_bias"] = mx.random.normal((heads, 2 * length - 1))
    elif case == "softcap":
        given["softcap"] = 30.0
    return mask, given


def dense_mask(case: str, given: dict[str, Any], mask: AttentionMask, length: int, dtype: mx.Dtype) -> mx.array | None:
    """Everything that hides or shifts scores as one array, which mx.fast and plain operations take."""
    import mlx.core as mx

    distance = mx.arange(length) - mx.arange(length)[:, None]
    visible = mask.dense(1, length, length)
    if case == "alibi":
        array = (-given["alibi_slopes"][:, None, None] * mx.abs(distance)).astype(dtype)
    elif case == "relative":
        array = given["relative_bias"][:, distance + length - 1].astype(dtype)
    else:
        return visible
    return array if visible is None else mx.where(visible, array, mx.array(-mx.inf, dtype=dtype))


def plain_attention(case: str, scale: float, query: mx.array, key: mx.array, value: mx.array, mask: Any) -> mx.array:
    """Attention in MLX operations, densely."""
    import mlx.core as mx

    group = query.shape[1] // key.shape[1]
    key, value = (mx.repeat(x, group, axis=1) if group > 1 else x for x in (key, value))
    score = (query @ key.swapaxes(-1, -2)) * scale
    if case == "softcap":
        score = 30.0 * mx.tanh(score / 30.0)
    if mask is not None:
        hidden = mx.array(-mx.inf, dtype=score.dtype)
        score = mx.where(mask, score, hidden) if mask.dtype == mx.bool_ else score + mask
    return mx.softmax(score.astype(mx.float32), axis=-1).astype(value.dtype) @ value


def passes(case: str, shape: argparse.Namespace, length: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """By side ("ours", "mx.fast", "plain"): a function that runs one pass; and the bytes planned for ours."""
    import mlx.core as mx

    from mlxlm import runtime
    from mlxlm.kernels import attention
    from mlxlm.kernels.attention.blocks import planned_bytes
    from mlxlm.kernels.attention.device import device_profile
    from mlxlm.kernels.attention.problem import describe

    mx.random.seed(0)
    dtype, kv_heads = getattr(mx, shape.dtype), shape.kv_heads or shape.heads
    sizes = {"query": shape.heads, "key": kv_heads, "value": kv_heads}
    arrays = {n: mx.random.normal((1, heads, length, shape.head_dim)).astype(dtype) for n, heads in sizes.items()}
    cotangent = mx.random.normal(arrays["query"].shape).astype(dtype)
    mask, given = arguments_of(case, shape.heads, length)
    scale = shape.head_dim**-0.5
    mx.eval(arrays, cotangent, given)

    def ours(query: mx.array, key: mx.array, value: mx.array) -> mx.array:
        return attention(query, key, value, scale=scale, mask=mask, **given, implementation=shape.ours)

    def fast(query: mx.array, key: mx.array, value: mx.array) -> mx.array:
        array = dense_mask(case, given, mask, length, dtype)
        return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=array)

    def plain(query: mx.array, key: mx.array, value: mx.array) -> mx.array:
        array = dense_mask(case, given, mask, length, dtype)
        return plain_attention(case, scale, query, key, value, array)

    def both_ways(function: Callable[..., mx.array]) -> Callable[[], Any]:
        step = mx.compile(lambda *matrices: mx.vjp(function, list(matrices[:3]), [matrices[3]]))
        return lambda: step(*arrays.values(), cotangent)

    problem = describe(*arrays.values(), mask, **given)
    planned = planned_bytes(problem, device_profile(runtime.backend()))
    return {"ours": both_ways(ours), "mx.fast": both_ways(fast), "plain": both_ways(plain)}, planned


def measure(run: Callable[[], Any], repetitions: int, limit: float | None) -> Row:
    """Milliseconds of a pass (median) and of the first one, and peak GB on top of what was held before."""
    import mlx.core as mx

    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    usual = mx.set_memory_limit(int(before + limit)) if limit else None
    start = time.perf_counter()
    mx.eval(run())
    first = time.perf_counter() - start
    mx.clear_cache()
    mx.synchronize()
    mx.reset_peak_memory()
    mx.eval(run())
    peak = (mx.get_peak_memory() - before) / GB
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        seconds.append(time.perf_counter() - start)
    if usual is not None:
        mx.set_memory_limit(usual)
    return {"ms": 1e3 * sorted(seconds)[len(seconds) // 2], "gb": peak, "first": first}


def dense_gigabytes(shape: argparse.Namespace, length: int) -> float:
    """What a dense pass holds: scores and weights, and their gradients."""
    return 4 * (4 if shape.dtype == "float32" else 2) * shape.heads * length * length / GB


def one_row(case: str, length: int, shape: argparse.Namespace) -> None:
    """Measure a row and print what is found as it comes, a JSON object a line: ours first, which can't run out."""
    sys.path.insert(0, str(ROOT))
    import mlxlm  # noqa: F401  before mlx.core, so that a fast BLAS can be loaded on Linux

    import mlx.core as mx  # isort: skip

    from mlxlm import runtime

    total = runtime.memory().total
    device = f"mlx {mx.__version__} on {runtime.backend()} ({mx.device_info().get('device_name')})"
    sides, planned = passes(case, shape, length)
    limit = planned if shape.memory_limit is None else shape.memory_limit * GB
    print(json.dumps({"device": device, "planned": limit / GB}), flush=True)
    print(json.dumps({"ours": measure(sides["ours"], shape.repetitions, limit)}), flush=True)
    if dense_gigabytes(shape, length) > (shape.dense_limit or (total or 16 * GB) / 2 / GB):
        return
    name = "plain" if case == "softcap" else "mx.fast"
    try:
        theirs = measure(sides[name], shape.repetitions, None)
    except RuntimeError as error:
        if case not in ADDITIVE or "VJP" not in str(error):
            raise
        name = "plain"
        theirs = measure(sides[name], shape.repetitions, None)
    print(json.dumps({"theirs": theirs | {"by": name}}), flush=True)


# ------------------------------------------------------------------------------------------------------------ the table


def run_row(case: str, length: int, given: list[str], seconds: float) -> Row:
    """A row from a process of its own; "problem" where it ended without theirs or ours."""
    command = [sys.executable, __file__, "--row", case, str(length), *given]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        output, last = done.stdout, (done.stderr.strip() or "killed").splitlines()[-1]
        problem = "" if done.returncode == 0 else last
    except subprocess.TimeoutExpired as error:
        found = error.stdout or b""
        output, problem = found.decode() if isinstance(found, bytes) else found, f"stopped after {seconds:.0f} s"
    row: Row = {"case": case, "length": length, "problem": problem}
    for line in output.splitlines():
        if line.startswith("{"):
            row |= json.loads(line)
    return row


HEAD = (
    f"{'case':<9}{'L':>6} |{'theirs ms':>10} {'ours ms':>9}{'ratio':>7} |{'theirs GB':>10} {'ours GB':>8}"
    f"{'ratio':>7} |{'limit GB':>9} |{'growth: theirs':>15}{'ours':>6} |{'first s':>8}"
)


def table_line(row: Row, half: Row | None) -> str:
    """One row; half: that of half the length, for the growth. Ratios say how many times less ours takes."""
    ours, theirs = row.get("ours"), row.get("theirs")

    def number(side: Row | None, key: str, form: str) -> str:
        return "-" if side is None else format(side[key], form)

    def ratio(above: Row | None, below: Row | None, key: str) -> str:
        return "-" if above is None or below is None or not below[key] else f"{above[key] / below[key]:.2f}"

    mark = "*" if theirs is not None and theirs["by"] == "plain" else " "
    half, planned = half or {}, format(row["planned"], ".3f") if row.get("planned") else "-"
    return (
        f"{row['case']:<9}{row['length']:>6} |{number(theirs, 'ms', '.1f'):>10}{mark}{number(ours, 'ms', '.1f'):>9}"
        f"{ratio(theirs, ours, 'ms'):>7} |{number(theirs, 'gb', '.3f'):>10}{mark}{number(ours, 'gb', '.3f'):>8}"
        f"{ratio(theirs, ours, 'gb'):>7} |{planned:>9} |{ratio(theirs, half.get('theirs'), 'gb'):>15}"
        f"{ratio(ours, half.get('ours'), 'gb'):>6} |{number(ours, 'first', '.1f'):>8}"
    )


def table(rows: Iterator[Row], say: Callable[[str], None]) -> list[Row]:
    """Print rows as they come, with the growth from the row of half the length, and what went wrong at the end."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        if not found:
            say(row.get("device", "no device answered"))
            say(HEAD)
        found[row["case"], row["length"]] = row
        say(table_line(row, found.get((row["case"], row["length"] // 2))))
    for row in found.values():
        if row["problem"]:
            say(f"{row['case']} {row['length']}: {row['problem']}")
    return list(found.values())


@dataclass(frozen=True)
class Clock:
    """A budget of seconds from now on."""

    seconds: float
    start: float

    def left(self) -> float:
        return self.start + self.seconds - time.monotonic()


def all_rows(shape: argparse.Namespace, given: list[str], measure_row: Callable[..., Row]) -> Iterator[Row]:
    """Every case and length, until the time is up; the longest at the end."""
    clock = Clock(shape.time_limit, time.monotonic())
    for length in sorted(shape.lengths):
        for case in shape.cases:
            if clock.left() <= 0:
                yield {"case": case, "length": length, "problem": "not run: the time limit"}
            else:
                yield measure_row(case, length, given, clock.left())


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 heads, float32, lengths 256 to 1024, once each")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(SHOWN))
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--ours", default="tiled", help="the implementation to compare")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--memory-limit", type=float, help="GB, while ours runs; 0: none; default: as planned")
    parser.add_argument("--dense-limit", type=float, help="GB, default half of the memory")
    parser.add_argument("--time-limit", type=float, default=480, help="seconds for the whole table, default 480")
    parser.add_argument("--row", nargs=2, metavar=("CASE", "LENGTH"), help=argparse.SUPPRESS)
    shape = parser.parse_args(given)
    quick = shape.quick
    shape.lengths = shape.lengths or ([256, 512, 1024] if quick else [2**n for n in range(10, 16)])
    shape.heads = shape.heads or (4 if quick else 32)
    shape.dtype = shape.dtype or ("float32" if quick else "bfloat16")
    shape.repetitions = shape.repetitions or (1 if quick else 3)
    return shape


def main() -> int:
    shape = arguments(sys.argv[1:])
    if shape.row:
        one_row(shape.row[0], int(shape.row[1]), shape)
        return 0
    print(
        f"{shape.dtype}, B=1 H={shape.heads} Hkv={shape.kv_heads or shape.heads} D={shape.head_dim}, {shape.ours}, "
        "forward and backward, compiled"
    )
    rows = table(all_rows(shape, sys.argv[1:], run_row), partial(print, flush=True))
    return 1 if any(row["problem"] and "ours" not in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
