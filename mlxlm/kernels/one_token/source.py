"""The text of the kernels: constants of the configuration, a header, and a body, for Metal's compiler or CUDA's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import mlx.core as mx

from mlxlm import runtime

_FOLDER = Path(__file__).parent
_METAL_TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
_CUDA_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}

# Metal's words in CUDA. MLX puts the header before the kernel, so they change nothing of what it includes itself.
_CUDA_WORDS = """
typedef unsigned int uint;
typedef unsigned short ushort;
#define constant static
#define device
#define threadgroup __shared__
#define METAL_FUNC __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define threadgroup_barrier(flags) __syncthreads()
__device__ __forceinline__ float simd_shuffle_xor(float x, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
__device__ __forceinline__ float simd_sum(float x) {
  for (int mask = 16; mask; mask /= 2) x += simd_shuffle_xor(x, ushort(mask));
  return x;
}
template <typename To, typename From>
__device__ __forceinline__ To as_type(From x) { return __uint_as_float(x); }
namespace precise {
__device__ __forceinline__ float cos(float x) { return ::cosf(x); }
__device__ __forceinline__ float sin(float x) { return ::sinf(x); }
__device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }
}
"""
_CUDA_PLACES = """
const uint3 threadgroup_position_in_grid = blockIdx;
const uint3 threadgroups_per_grid = make_uint3(gridDim.x, gridDim.y, gridDim.z);
const uint thread_index_in_simdgroup = threadIdx.x % 32;
const uint simdgroup_index_in_threadgroup = threadIdx.x / 32;
(void)threadgroup_position_in_grid, (void)threadgroups_per_grid;
"""

Constants = tuple[tuple[str, int | float | str], ...]


def chunk(dtype: mx.Dtype) -> int:
    """Elements in the 16 bytes that a lane reads at once."""
    return 16 // dtype.size


def launch(
    name: str,
    dtype: mx.Dtype,
    constants: Constants,
    inputs: Mapping[str, mx.array],
    outputs: Mapping[str, Sequence[int]],
    *,
    threadgroups: tuple[int, int],
    simdgroups: int,
    result: mx.Dtype | None = None,
) -> list[mx.array]:
    """Run a kernel: what it writes, in order.

    dtype: its element type.  constants: see `kernel`.  inputs: by the names that it has for them.  outputs: shapes by
    name.  threadgroups: along two axes, each of so many simdgroups.  result: dtype of the outputs, default `dtype`.
    """
    threads = 32 * simdgroups
    return kernel(name, dtype, constants, tuple(inputs), tuple(outputs))(
        inputs=list(inputs.values()),
        output_shapes=list(outputs.values()),
        output_dtypes=[result or dtype] * len(outputs),
        grid=(threadgroups[0] * threads, threadgroups[1], 1),
        threadgroup=(threads, 1, 1),
    )


@cache
def kernel(
    name: str, dtype: mx.Dtype, constants: Constants, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Callable[..., list[mx.array]]:
    """The kernel object of a configuration; MLX compiles it when it first runs.

    constants: ints and floats become macros, a string is a line of its own text.
    """
    cuda = runtime.backend() == "cuda"
    header, body = text(name, dtype, constants, cuda=cuda)
    digest = sha256((header + body).encode()).hexdigest()[:16]  # MLX keeps kernels by name, also on disk
    build = mx.fast.cuda_kernel if cuda else mx.fast.metal_kernel
    return build(
        name=f"mlxlm_one_token_{name}_{digest}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=body,
        header=header,
    )


def text(name: str, dtype: mx.Dtype, constants: Constants, *, cuda: bool) -> tuple[str, str]:
    """Header and body of a kernel."""
    lines = [_CUDA_WORDS if cuda else '#define UNROLL _Pragma("clang loop unroll(full)")']
    lines.append(f"typedef {(_CUDA_TYPES if cuda else _METAL_TYPES)[dtype]} element_t;")
    lines.append(f"#define CHUNK {chunk(dtype)}")
    if "BITS" not in dict(constants):
        lines.append("#define BITS 0")
    functions = []
    for key, value in constants:
        if isinstance(value, str):
            functions.append(value)
        else:
            lines.append(f"#define {key} {f'{value!r}f' if isinstance(value, float) else value}")
    body = _read(name)
    return "\n".join([*lines, _read("header"), *functions, ""]), _CUDA_PLACES + body if cuda else body


@cache
def _read(name: str) -> str:
    return (_FOLDER / f"{name}.metal").read_text(encoding="ascii")
