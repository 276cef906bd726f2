"""`mx.fast.metal_kernel` on the emulator, so that the code that launches kernels is tested with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from tools.metal_emulator import compiler
from tools.metal_emulator.machine import Counters, run_kernel
from tools.metal_emulator.source import KernelSource, capture, real_metal_kernel


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """One kernel that ran. name: as given to metal_kernel.  grid, threadgroup: in threads.

    buffers: what it read and wrote, flat and by argument name, if the device keeps them.
    """

    name: str
    kernel: KernelSource
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    counters: Counters
    buffers: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(kw_only=True)
class Metal:
    """The emulated device. dispatches: what ran, in order.  seed: of the order of threads.

    collecting: kernels are recorded in `kernels` and give zeros instead of running, so that a test session can build
    all that it needs at once.
    keeping: dispatches keep their buffers.
    """

    seed: int = 0
    collecting: bool = False
    keeping: bool = False
    dispatches: list[Dispatch] = field(default_factory=list)
    kernels: dict[str, KernelSource] = field(default_factory=dict)

    def build(self) -> None:
        """Build all kernels recorded so far."""
        compiler.engine()
        compiler.build(self.kernels.values())

    def counters(self, name: str) -> Counters:
        """The counters of the only dispatch of this name."""
        (found,) = (d.counters for d in self.dispatches if d.name == name)
        return found


@contextmanager
def emulated_metal(*, seed: int = 0, collecting: bool = False, keeping: bool = False) -> Iterator[Metal]:
    """Put the emulator in the place of `mx.fast.metal_kernel`.

    A kernel object made before keeps pointing at MLX, and one made inside at this device: caches of such objects must
    be cleared on both ends.
    """
    metal = Metal(seed=seed, collecting=collecting, keeping=keeping)
    real = real_metal_kernel()
    mx.fast.metal_kernel = _replacement(metal)
    try:
        yield metal
    finally:
        mx.fast.metal_kernel = real


def _replacement(metal: Metal) -> Callable[..., Any]:
    def metal_kernel(
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        **options: Any,
    ) -> Callable[..., Any]:
        description = (name, tuple(input_names), tuple(output_names), source, header, tuple(sorted(options.items())))

        def call(
            *,
            inputs: Sequence[mx.array],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            **rest: Any,
        ) -> list[mx.array]:
            if rest:
                raise NotImplementedError(f"the emulator does not know the arguments {sorted(rest)} of a kernel call")
            shapes = tuple(tuple(shape) for shape in output_shapes)
            kernel = _generate(
                _Freeze(description),
                tuple((x.shape, x.dtype) for x in inputs),
                shapes,
                tuple(output_dtypes),
                grid,
                threadgroup,
            )
            metal.kernels[kernel.digest] = kernel
            if metal.collecting:
                return [mx.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, output_dtypes, strict=True)]
            contiguous = options.get("ensure_row_contiguous", True)
            buffers = _input_buffers(kernel, input_names, inputs, contiguous)
            outputs = {
                n: _output(shape, dtype) for n, shape, dtype in zip(output_names, shapes, output_dtypes, strict=True)
            }
            counters = run_kernel(kernel, {**buffers, **outputs}, grid, threadgroup, seed=metal.seed)
            metal.dispatches.append(
                Dispatch(
                    name=name, kernel=kernel, grid=tuple(grid), threadgroup=tuple(threadgroup), counters=counters,
                    buffers={**buffers, **outputs} if metal.keeping else {},
                )
            )  # fmt: skip
            return [
                mx.array(outputs[n]).view(dtype).reshape(shape)
                for n, shape, dtype in zip(output_names, shapes, output_dtypes, strict=True)
            ]

        return call

    return metal_kernel


class _Freeze:
    """A hashable wrapper of what a kernel object was made from, for the cache of generated texts."""

    def __init__(self, description: tuple[Any, ...]) -> None:
        self.description = description
        self._key = repr(description)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Freeze) and self._key == other._key


@cache
def _generate(
    frozen: _Freeze,
    inputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...],
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[mx.Dtype, ...],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> KernelSource:
    name, input_names, output_names, source, header, options = frozen.description
    kernel = real_metal_kernel()(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=source,
        header=header,
        **dict(options),
    )

    def launch(*arrays: mx.array) -> list[mx.array]:
        return kernel(
            inputs=list(arrays), output_shapes=list(shapes), output_dtypes=list(dtypes), grid=grid,
            threadgroup=threadgroup, verbose=True, stream=mx.gpu,
        )  # fmt: skip

    (generated,) = capture(launch, *(mx.zeros(shape, dtype=dtype) for shape, dtype in inputs))
    return generated


def _input_buffers(
    kernel: KernelSource, names: Sequence[str], inputs: Sequence[mx.array], contiguous: bool
) -> dict[str, np.ndarray]:
    """The input arrays, and what MLX says about them (`q_shape`, `q_strides`, `q_ndim`) where the kernel asks."""
    wanted = {argument.name for argument in kernel.arguments}
    buffers = {}
    for name, array in zip(names, inputs, strict=True):
        elements = _as_numpy(mx.contiguous(array) if contiguous else array)
        strides = [stride // elements.itemsize for stride in elements.strides]
        buffers[name] = _memory_of(elements)
        for suffix, values, dtype in (
            ("shape", elements.shape, np.int32),
            ("strides", strides, np.int64),
            ("ndim", [elements.ndim], np.int32),
        ):
            if f"{name}_{suffix}" in wanted:
                buffers[f"{name}_{suffix}"] = np.array(values, dtype=dtype)
    return buffers


def _as_numpy(array: mx.array) -> np.ndarray:
    """A numpy view with the strides of the array; bfloat16 as its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def _memory_of(elements: np.ndarray) -> np.ndarray:
    """The memory that a strided view spans, flat. Between its elements is NaN, as if that were somebody else's."""
    strides = [stride // elements.itemsize for stride in elements.strides]
    if any(stride < 0 for stride in strides):
        raise NotImplementedError("the emulator has no arrays with negative strides")
    extent = 1 + sum((size - 1) * stride for size, stride in zip(elements.shape, strides, strict=True))
    memory = np.full(extent * elements.itemsize, 0xFF, dtype=np.uint8).view(elements.dtype)
    np.lib.stride_tricks.as_strided(memory, elements.shape, elements.strides)[...] = elements
    return memory


def _output(shape: Sequence[int], dtype: mx.Dtype) -> np.ndarray:
    return np.empty(int(np.prod(shape)), dtype=np.dtype(f"u{dtype.size}"))
