"""Time and peak memory of attention, forward and backward: our tiled path against mx.fast.

    python tools/benchmarks/attention.py --lengths 1024 4096 --masks causal segments alibi
    python tools/benchmarks/attention.py --dtype bfloat16 --heads 32 --lengths 8192 --memory-limit 1.0

One line a mask and length. Times are medians of the repetitions, GB what a pass holds on top of its inputs at its peak.
GPU backends run ahead of the device and keep the buffers of many blocks alive; --memory-limit (GB, for our side) makes
them wait, as mlxlm's memory plan does in training. A dash means that mx.fast has no gradient for the case on this
backend, or that the dense computation was estimated to need more than --dense-limit GB and was not tried. Both sides
run inside mx.compile, as a training step does; --eager leaves it away.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlxlm  # noqa: F401  before mlx.core, so that a fast BLAS can be loaded on Linux

import mlx.core as mx  # isort: skip

from mlxlm import runtime
from mlxlm.kernels import AttentionMask, attention

Arrays = dict[str, mx.array]
GB = 1e9
DOCUMENT = 1000  # tokens of a packed document
WINDOW = 1024


@dataclass(frozen=True)
class Case:
    """A mask by length, and the score modifiers by (heads, length); `dense` says how mx.fast is given them."""

    mask: Callable[[int], AttentionMask]
    modifiers: Callable[[int, int], Arrays] = lambda heads, length: {}
    dense: Callable[[Arrays, int, mx.Dtype], mx.array] | None = None


def packed(length: int) -> AttentionMask:
    ids = (mx.arange(length) // DOCUMENT)[None]
    return AttentionMask(causal=True, query_segments=ids, key_segments=ids)


def dense_alibi(given: Arrays, length: int, dtype: mx.Dtype) -> mx.array:
    distance = mx.abs(mx.arange(length)[:, None] - mx.arange(length))
    return (-given["alibi_slopes"][:, None, None] * distance).astype(dtype)


def dense_relative(given: Arrays, length: int, dtype: mx.Dtype) -> mx.array:
    diagonal = mx.arange(length) - mx.arange(length)[:, None] + (length - 1)
    return given["relative_bias"][:, diagonal].astype(dtype)


CASES = {
    "plain": Case(lambda length: AttentionMask()),
    "causal": Case(lambda length: AttentionMask(causal=True)),
    "window": Case(lambda length: AttentionMask(causal=True, window=WINDOW)),
    "segments": Case(packed),
    "lengths": Case(lambda length: AttentionMask(key_lengths=mx.array([length * 3 // 4]))),
    "alibi": Case(
        lambda length: AttentionMask(causal=True),
        lambda heads, length: {"alibi_slopes": 2.0 ** -mx.arange(1, heads + 1)},
        dense_alibi,
    ),
    "relative": Case(
        lambda length: AttentionMask(),
        lambda heads, length: {"relative_bias": mx.random.normal((heads, 2 * length - 1))},
        dense_relative,
    ),
}


def make_pass(case: Case, implementation: str, shape: argparse.Namespace, length: int) -> Callable[[], object]:
    """A function that runs one pass on inputs made once."""
    mx.random.seed(0)
    dtype = getattr(mx, shape.dtype)
    arrays = {
        "query": mx.random.normal((shape.batch, shape.heads, length, shape.head_dim)),
        "key": mx.random.normal((shape.batch, shape.kv_heads or shape.heads, length, shape.head_dim)),
        "value": mx.random.normal((shape.batch, shape.kv_heads or shape.heads, length, shape.head_dim)),
    }
    arrays = {name: array.astype(dtype) for name, array in arrays.items()} | case.modifiers(shape.heads, length)
    mask = case.mask(length)
    mx.eval(arrays)

    def forward(arrays: Arrays) -> mx.array:
        if implementation == "mlx" and case.dense is not None:
            # Not through our door, which would take the gradient from the tiled path.
            array = case.dense(arrays, length, dtype)
            if mask.causal:
                array = mx.where(mask.dense(shape.batch, length, length), array, mx.array(-mx.inf, dtype=dtype))
            matrices = arrays["query"], arrays["key"], arrays["value"]
            return mx.fast.scaled_dot_product_attention(*matrices, scale=shape.head_dim**-0.5, mask=array)
        return attention(**arrays, mask=mask, implementation=implementation)

    function = forward
    if not shape.forward_only:
        function = mx.grad(lambda arrays: forward(arrays).astype(mx.float32).square().sum())
    if not shape.eager:
        function = mx.compile(function)
    return lambda: function(arrays)


def measure(run: Callable[[], object], repetitions: int) -> tuple[float, float]:
    """Median seconds of a pass, and peak GB on top of what was held before."""
    mx.eval(run())  # kernels are compiled and caches filled
    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    peak = (mx.get_peak_memory() - before) / GB
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), peak


def measure_mlx(case: Case, shape: argparse.Namespace, length: int) -> tuple[float, float] | None:
    """The same for mx.fast; None where it has no gradient: on CUDA, of additive masks."""
    try:
        return measure(make_pass(case, "mlx", shape, length), shape.repetitions)
    except RuntimeError as error:
        if "VJP" not in str(error):
            raise
        return None


def dense_estimate(shape: argparse.Namespace, length: int) -> float:
    """GB that a dense pass holds: scores and weights, and their gradients."""
    item = getattr(mx, shape.dtype).size
    copies = 2 if shape.forward_only else 4
    return copies * item * shape.batch * shape.heads * length * length / GB


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--masks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--ours", default="tiled", help="the implementation to compare with mx.fast")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--eager", action="store_true", help="without mx.compile")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory-limit", type=float, default=None, help="GB, while ours runs")
    parser.add_argument("--dense-limit", type=float, default=None, help="GB; default half of the memory")
    return parser.parse_args()


def main() -> None:
    shape = arguments()
    dense_limit = shape.dense_limit or (runtime.memory().total or 16 * GB) / 2 / GB
    print(
        f"mlx {mx.__version__} on {runtime.backend()} ({mx.device_info().get('device_name')}), {shape.dtype}, "
        f"B={shape.batch} H={shape.heads} Hkv={shape.kv_heads or shape.heads} D={shape.head_dim}, "
        f"{'forward' if shape.forward_only else 'forward and backward'}, {'eager' if shape.eager else 'compiled'}, "
        f"memory limit {shape.memory_limit or 'none'}"
    )
    times = f"{'mx.fast ms':>11}{shape.ours + ' ms':>11}{'speed':>8}"
    print(f"{'mask':<10}{'L':>7} | {times} | {'mx.fast GB':>11}{shape.ours + ' GB':>11}{'memory':>8}")
    for name in shape.masks:
        for length in shape.lengths:
            case, theirs = CASES[name], None
            if dense_estimate(shape, length) <= dense_limit:
                theirs = measure_mlx(case, shape, length)
            mx.clear_cache()
            usual = mx.set_memory_limit(int(shape.memory_limit * GB)) if shape.memory_limit else None
            ours = measure(make_pass(case, shape.ours, shape, length), shape.repetitions)
            if usual is not None:
                mx.set_memory_limit(usual)
            mx.clear_cache()
            print(line(name, length, theirs, ours), flush=True)


def line(name: str, length: int, theirs: tuple[float, float] | None, ours: tuple[float, float]) -> str:
    """One row: times in ms and peaks in GB, and how many times faster and smaller ours is."""
    milliseconds, peak = ours[0] * 1e3, ours[1]
    if theirs is None:
        return f"{name:<10}{length:>7} | {'-':>11}{milliseconds:>11.1f}{'-':>8} | {'-':>11}{peak:>11.3f}{'-':>8}"
    faster, smaller = theirs[0] / ours[0], theirs[1] / max(peak, 1e-9)
    times = f"{theirs[0] * 1e3:>11.1f}{milliseconds:>11.1f}{faster:>7.2f}x"
    return f"{name:<10}{length:>7} | {times} | {theirs[1]:>11.3f}{peak:>11.3f}{smaller:>7.1f}x"


if __name__ == "__main__":
    main()
