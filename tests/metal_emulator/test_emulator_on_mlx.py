"""The emulator on MLX's own attention kernel, which ships for Apple's GPUs: what is right there must be right here.

The text comes from the headers that the installed mlx package carries; without them the tests are skipped.
"""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tools.metal_emulator import machine
from tools.metal_emulator.source import parse

INCLUDE = Path(mx.__file__).parent / "include"
KERNEL = "mlx/backend/metal/kernels/steel/attn/kernels/steel_attention.h"
pytestmark = pytest.mark.skipif(not (INCLUDE / KERNEL).exists(), reason="this mlx package has no Metal headers")

_PRELUDE = """
template <typename U> struct Limits;
template <> struct Limits<float> {
  static constexpr float finite_min = -3.4028234663852886e38f;
};
"""


def flattened(name: str, seen: set[str]) -> str:
    """A header with what it includes put in, each once."""
    if name in seen:
        return ""
    seen.add(name)

    def put_in(match: re.Match[str]) -> str:
        return flattened(match.group(1), seen)

    text = (INCLUDE / name).read_text()
    # The emulator puts the text into namespace metal already.
    text = text.replace("namespace metal {", "").replace("} // namespace metal", "")
    return re.sub(r'^#include "(mlx/[^"]+)".*$', put_in, text, flags=re.MULTILINE)


def steel_attention(kind: str, width: int, keys: int, causal: bool, aligned: bool):
    """MLX's fused attention for one head width, in the form of a generated kernel."""
    text = flattened(KERNEL, set())
    for name, value in {
        "align_Q": aligned, "align_K": aligned, "has_mask": False, "do_causal": causal, "has_sinks": False,
        "save_lse": True,
    }.items():  # fmt: skip
        text, count = re.subn(
            rf"constant bool {name} \[\[function_constant\(\d+\)\]\];",
            f"constant constexpr bool {name} = {value:d};",
            text,
        )
        assert count == 1
    text = text.replace("constexpr constant", "constexpr").replace("#pragma once", "")
    text = re.sub(r"\[\[threadgroup\(\d+\)\]\]", "", text)
    text = re.sub(r"\[\[kernel, max_total_threads_per_threadgroup\([^)]*\)\]\]", "", text)
    names = ("Q", "K", "V")
    arguments = [f"const device {kind}* {name} [[buffer({i})]]" for i, name in enumerate(names)]
    arguments += [
        f"device {kind}* O [[buffer(3)]]", "const constant AttnParams* params [[buffer(4)]]",
        "device float* lse [[buffer(5)]]", "uint thread_index_in_simdgroup [[thread_index_in_simdgroup]]",
        "uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]]",
        "uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]",
        "uint3 thread_position_in_threadgroup [[thread_position_in_threadgroup]]",
    ]  # fmt: skip
    call = f"""
        attention<{kind}, 32, {keys}, {width}, {width}, 4, 1, float, float>(
            Q, K, V, O, params, nullptr, nullptr, nullptr, lse, thread_index_in_simdgroup,
            simdgroup_index_in_threadgroup, threadgroup_position_in_grid, thread_position_in_threadgroup);
    """
    return parse(f"{_PRELUDE}\n{text}\n[[kernel]] void steel({', '.join(arguments)}) {{{call}\n}}\n")


def run(kind: str, width: int, length: int, causal: bool) -> dict[str, float]:
    """Errors of output and log-sum-exp against float64, for 1 batch element, 4 query heads and 2 key heads."""
    keys = 32 if width < 128 else 16
    rng = np.random.default_rng(0)
    dtype = np.float32 if kind == "float" else np.float16
    q, k, v = (rng.standard_normal((1, h, length, width)).astype(dtype) for h in (4, 2, 2))
    scale = width**-0.5
    fields = np.dtype(
        [("sizes", "<i4", 6), ("scale", "<f4"), ("blocks", "<i4", 7), ("strides", "<i8", (4, 3))], align=True
    )
    params = np.zeros(1, dtype=fields)
    blocks, key_blocks = -(-length // 32), -(-length // keys)
    params["sizes"] = [1, 4, width, length, length, 2]
    params["scale"] = scale
    params["blocks"] = [
        blocks, key_blocks, length // 32, length // keys, length % 32, length % keys, 0
    ]  # fmt: skip
    params["strides"] = [[h * length * width, length * width, width] for h in (4, 2, 2, 4)]
    out, lse = np.empty((1, 4, length, width), dtype=dtype), np.empty((1, 4, length), dtype=np.float32)
    kernel = steel_attention(kind, width, keys, causal, aligned=length % 32 == 0)
    buffers = {"Q": q, "K": k, "V": v, "O": out, "params": params, "lse": lse}
    machine.run_kernel(kernel, buffers, (blocks * 128, 4, 1), (128, 1, 1))

    query, key, value = (x.astype(np.float64) for x in (q, k.repeat(2, axis=1), v.repeat(2, axis=1)))
    score = scale * query @ key.swapaxes(-1, -2)
    if causal:
        score = np.where(np.tri(length, dtype=bool), score, -np.inf)
    total = np.exp(score).sum(axis=-1, keepdims=True)
    exact = (np.exp(score) / total) @ value
    return {"out": np.abs(out - exact).max(), "lse": np.abs(lse - np.log(total[..., 0])).max()}


@pytest.mark.parametrize("length", [64, 75])
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize(("kind", "width", "limit"), [("float", 64, 2e-6), ("half", 80, 1e-3), ("float", 128, 2e-6)])
def test_the_fused_attention_of_mlx_gives_attention(kind, width, limit, causal, length):
    assert max(run(kind, width, length, causal).values()) < limit
