"""Sums of squares of large arrays, in one reading.

MLX writes the squares before it adds them up: of a 16-bit array 10 or more bytes move for each element instead of 2,
which of a training step that updates all weights is several percent, since the norm of its gradient takes all of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from mlxlm.runtime import backend

_THREADS = 256
_BLOCKS = 528  # four for each processor of a large GPU
_BYTES = 16  # that a thread reads at once

# x is read from end to end by all blocks together; each leaves its share of the sum. count: elements of x.
_SOURCE = """
    constexpr int at_once = 16 / sizeof(T);
    const uint4* wide = reinterpret_cast<const uint4*>(x);
    const size_t groups = static_cast<size_t>(count[0]) / at_once;
    const size_t threads = static_cast<size_t>(gridDim.x) * blockDim.x;
    float total = 0.0f;
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < groups; i += threads) {
        const uint4 group = wide[i];
        const T* values = reinterpret_cast<const T*>(&group);
        #pragma unroll
        for (int k = 0; k < at_once; ++k) {
            const float value = static_cast<float>(values[k]);
            total += value * value;
        }
    }
    __shared__ float warps[32];
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (unsigned int warp = 0; warp < blockDim.x / 32; ++warp) sum += warps[warp];
        parts[blockIdx.x] = sum;
    }
"""


def square_sums(x: mx.array) -> mx.array:
    """Float32 (parts,), which together are the sum of the squares of x, a floating array of any shape."""
    at_once = _BYTES // x.itemsize
    if backend() == "cuda" and x.size % at_once == 0 and x.size and _kernel_works():
        return _by_kernel(x)
    # `mx.compile` would find that an optimizer wants x in float32 too, and keep that for both.
    (x,) = mx.depends([x], [x])
    return x.astype(mx.float32).square().sum().reshape(1)


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(name="square_sums", input_names=["x", "count"], output_names=["parts"], source=_SOURCE)


def _by_kernel(x: mx.array) -> mx.array:
    blocks = min(_BLOCKS, -(-x.nbytes // (_BYTES * _THREADS)))
    return _kernel()(
        inputs=[x, mx.array(x.size, mx.int64)], template=[("T", x.dtype)], grid=(blocks * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1), output_shapes=[(blocks,)], output_dtypes=[mx.float32],
    )[0]  # fmt: skip


@cache
def _kernel_works() -> bool:
    """Whether the kernel compiles here, in all dtypes, and says what MLX's operations say. Tried once a process."""
    values = (mx.arange(40 * 264, dtype=mx.float32) % 13) - 5.0
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        x = values.astype(dtype)  # small whole numbers, exact in all of them
        try:
            found = _by_kernel(x).sum().item()
        except (RuntimeError, ValueError):
            return False
        if found != values.square().sum().item():
            return False
    return True
