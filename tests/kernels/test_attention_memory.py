"""The tiled path holds memory linear in the length, forward and backward, whatever the mask and the modifiers."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxlm import runtime
from mlxlm.kernels import AttentionMask, attention
from mlxlm.kernels.attention import tiled
from mlxlm.kernels.attention.blocks import planned_bytes
from mlxlm.kernels.attention.device import CPU
from mlxlm.kernels.attention.problem import describe

pytestmark = pytest.mark.skipif(
    runtime.backend() != "cpu", reason="GPUs run ahead, so peaks of small problems say nothing; tools/benchmarks does"
)
H, D = 2, 16


def _segments(length: int) -> mx.array:
    return (mx.arange(length) // 100)[None]


MASKS = {
    "plain": lambda n: AttentionMask(),
    "causal": lambda n: AttentionMask(causal=True),
    "window": lambda n: AttentionMask(causal=True, window=128),
    "segments": lambda n: AttentionMask(causal=True, query_segments=_segments(n), key_segments=_segments(n)),
    "prefix": lambda n: AttentionMask(causal=True, prefix_lengths=mx.array([n // 3])),
    "lengths": lambda n: AttentionMask(key_lengths=mx.array([n // 2])),
}
MODIFIERS = {
    "alibi": lambda n: {"alibi_slopes": mx.full((H,), 0.1)},
    "relative-bias": lambda n: {"relative_bias": mx.zeros((H, 2 * n - 1))},
    "key-bias": lambda n: {"bias": mx.zeros((1, 1, 1, n))},
    "softcap": lambda n: {"softcap": 20.0},
    "sinks": lambda n: {"sinks": mx.zeros((H,))},
    "dropout": lambda n: {"dropout": 0.1, "dropout_key": mx.random.key(0)},
}
CASES = {name: (mask, lambda n: {}) for name, mask in MASKS.items()}
CASES |= {name: (MASKS["causal"], modifier) for name, modifier in MODIFIERS.items()}


def peak(implementation: str, case: str, length: int) -> int:
    """Bytes of a forward and backward pass on top of its inputs."""
    make_mask, make_modifiers = CASES[case]
    mask, options = make_mask(length), make_modifiers(length)
    arrays = {name: mx.random.normal((1, H, length, D)) for name in ("query", "key", "value")}
    arrays |= {name: array for name, array in options.items() if isinstance(array, mx.array) and name != "dropout_key"}
    rest = {name: value for name, value in options.items() if name not in arrays}
    mx.eval(arrays, rest.get("dropout_key", arrays["query"]))

    def loss(arrays):
        return attention(**arrays, **rest, mask=mask, implementation=implementation).square().sum()

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    # MLX allocates for operations ahead of the one that runs, how many depends on the clock. Above its memory limit it
    # waits for each instead, so that the peak is a property of the computation.
    limit = mx.set_memory_limit(1)
    try:
        mx.eval(mx.value_and_grad(loss)(arrays))
    finally:
        mx.set_memory_limit(limit)
    return mx.get_peak_memory() - before


@pytest.fixture
def tight(monkeypatch):
    """A budget so small that blocks are as small as they get: what remains must grow linearly."""
    device = CPU.__class__(name="tight", kind="cpu", block_bytes=1)
    monkeypatch.setattr(tiled, "device_profile", lambda backend: device)


@pytest.mark.parametrize("case", CASES)
def test_twice_the_length_takes_at_most_2_2_times_the_memory(case, tight):
    # Whatever else runs can only add to a peak, so the least of a few is the one that counts.
    short, long = (min(peak("tiled", case, length) for _ in range(4)) for length in (768, 1536))
    assert long <= 2.2 * short
    assert long < 4 * H * 1536 * 1536, "less than the scores alone"


@pytest.mark.parametrize("case", CASES)
def test_a_pass_takes_no_more_than_planned(case):
    make_mask, make_modifiers = CASES[case]
    matrices = [mx.zeros((1, H, 700, D))] * 3
    planned = planned_bytes(describe(*matrices, make_mask(700), **make_modifiers(700)), CPU)
    assert min(peak("tiled", case, 700) for _ in range(2)) <= planned


def test_the_measure_sees_a_dense_implementation():
    assert peak("mlx", "segments", 1536) > 3 * peak("mlx", "segments", 768)
