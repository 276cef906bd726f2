"""Running the kernels: arguments, grids, and the split of a call over several launches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlxlm.kernels.attention.metal.operands import Arrays, block_bounds, readable, strided_bias
from mlxlm.kernels.attention.metal.source import Features, Shape, kernel
from mlxlm.kernels.attention.plan import TilePlan

# Inputs in the order in which kernels take them; each kernel takes those that the call has.
_MATRICES = ("query", "key", "value")
_MASK = ("row_bounds", "block_bounds", "prefix", "query_segments", "key_segments")
_TERMS = ("alibi_slopes", "query_offset", "relative_bias", "bias", "dropout_words")
_FORWARD = (*_MATRICES, *_MASK, *_TERMS, "sinks")
_BACKWARD = (*_MATRICES, "output_gradient", "lse", "delta", *_MASK, *_TERMS)

_BATCH_FIRST = ("row_bounds", "prefix", "query_segments", "key_segments", "query_offset")
_HEADS_FIRST = ("alibi_slopes", "relative_bias", "sinks")
_BATCH_AND_HEADS = ("query", "output_gradient", "lse", "delta", "bias")
_READABLE = (*_MASK, *_HEADS_FIRST, "query_offset", "dropout_words", "lse", "delta", "lse_gradient")
_LN2 = 0.6931471805599453

Outputs = dict[str, tuple[tuple[int, ...], mx.Dtype]]  # name -> shape and dtype
Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """One call of attention: its shapes and constants, and its passes. constants: see `constant_arrays`."""

    plan: TilePlan
    features: Features
    constants: Arrays

    def forward(self, inputs: Arrays) -> tuple[mx.array, mx.array]:
        """Output (B, H, Lq, Dv) in the dtype of the query, and log-sum-exp in base 2, float32 (B, H, Lq)."""
        arrays = self._arrays(inputs)
        if self.plan.decode is not None:
            found = self._decode(self._part(arrays, (0, self.plan.problem.batch), (0, self.plan.problem.kv_heads)))
        else:
            found = self._split(arrays, self.plan.forward.dispatches, self._forward)
        return found["out"], found["lse"]

    def backward(
        self, inputs: Arrays, out: mx.array, lse: mx.array, out_gradient: mx.array, lse_gradient: mx.array
    ) -> Arrays:
        """Gradients of all inputs by name, float32 or in the dtype of the input.

        out, lse: of `forward`.  out_gradient, lse_gradient: with respect to the output and the natural log-sum-exp.
        """
        arrays = self._arrays(inputs) | {"output_gradient": out_gradient, "lse": lse}
        arrays["delta"] = self._delta(arrays | {"out": out, "lse_gradient": lse_gradient})
        gradients = self._split(arrays, self.plan.dq.dispatches, self._query_gradient)
        gradients |= self._split(arrays, self.plan.dkdv.dispatches, self._key_value_gradient)
        if self.features.alibi:
            gradients["alibi_slopes"] = gradients["alibi_slopes"].sum((0, 2))
        if self.features.relative_bias:
            gradients["relative_bias"] = self._relative_bias_gradient(arrays)
        if self.features.bias:
            gradients["bias"] = self._bias_gradient(arrays, inputs["bias"].shape)
        if self.features.sinks:
            # A sink is a score whose value is 0; where no key is seen the log-sum-exp is +inf and it counts nothing.
            weight = mx.exp(arrays["sinks"][:, None] - lse * _LN2)
            gradients["sinks"] = -(weight * arrays["delta"]).sum((0, 2))
        return gradients

    # ---------------------------------------------------------------------------------------- what kernels read

    def _arrays(self, inputs: Arrays) -> Arrays:
        """All arrays of the call in the types that the kernels read."""
        problem = self.plan.problem
        arrays = dict(inputs) | self.constants
        for name in _HEADS_FIRST:
            if name in arrays:
                arrays[name] = arrays[name].astype(mx.float32)
        if "bias" in arrays:
            shape = (problem.batch, problem.heads, problem.query_length, problem.key_length)
            arrays["bias"] = strided_bias(arrays["bias"], shape)
        return arrays

    def _part(self, arrays: Arrays, batch: tuple[int, int], kv_heads: tuple[int, int]) -> Arrays:
        """The arrays for some batch elements and key heads, as views."""
        problem = self.plan.problem
        heads = (kv_heads[0] * problem.group, kv_heads[1] * problem.group)
        part = dict(arrays)
        if (batch, kv_heads) != ((0, problem.batch), (0, problem.kv_heads)):
            for name in part:
                if name in _BATCH_FIRST and part[name].shape[0] > 1:
                    part[name] = part[name][slice(*batch)]
                elif name in _HEADS_FIRST:
                    part[name] = part[name][slice(*heads)]
                elif name in _BATCH_AND_HEADS:
                    part[name] = part[name][slice(*batch), slice(*heads)]
                elif name in ("key", "value"):
                    part[name] = part[name][slice(*batch), slice(*kv_heads)]
        if "dropout_key" in part:
            counters = mx.array([batch[0], problem.heads, heads[0], 0, 0, 0], dtype=mx.uint32)
            part["dropout_words"] = mx.concatenate([part["dropout_key"], counters])
        return part

    def _split(self, arrays: Arrays, dispatches: int, run: Callable[[Arrays], Arrays]) -> Arrays:
        """Run a pass in so many launches, each for some batch elements and key heads, and join what they give.

        Launches bound the time of one command buffer, which the watchdog of a Mac with a display limits.
        """
        problem = self.plan.problem
        batches = _ranges(problem.batch, dispatches)
        kv_heads = _ranges(problem.kv_heads, -(-dispatches // len(batches)))
        found = [[run(self._part(arrays, b, h)) for h in kv_heads] for b in batches]
        return {
            name: _joined([_joined([part[name] for part in row], axis=1) for row in found], axis=0)
            for name in found[0][0]
        }

    def _launch(
        self, name: str, shape: Shape, arrays: Arrays, inputs: tuple[str, ...], outputs: Outputs, grid: Grid
    ) -> list[mx.array]:
        """Run a kernel. inputs: names, those of them that `arrays` holds are passed.  grid: in threadgroups."""
        names = tuple(n for n in inputs if n in arrays)
        run = kernel(name, self.features, shape, names, tuple(outputs))
        return run(
            inputs=[readable(arrays[n]) if n in _READABLE else arrays[n] for n in names],
            output_shapes=[output_shape for output_shape, _ in outputs.values()],
            output_dtypes=[dtype for _, dtype in outputs.values()],
            grid=(grid[0] * shape.threads, grid[1], grid[2]),
            threadgroup=(shape.threads, 1, 1),
        )

    def _with_block_bounds(self, arrays: Arrays, rows: int) -> Arrays:
        if "row_bounds" not in arrays:
            return arrays
        return arrays | {"block_bounds": block_bounds(arrays["row_bounds"], rows)}

    # ------------------------------------------------------------------------------------------------- kernels

    def _forward(self, arrays: Arrays) -> Arrays:
        shape = Shape.of(self.plan.forward)
        batch, heads, length, _ = arrays["query"].shape
        out, lse = self._launch(
            "forward", shape, self._with_block_bounds(arrays, shape.block_queries), _FORWARD,
            self._out_and_lse(arrays), (-(-length // shape.block_queries), heads, batch),
        )  # fmt: skip
        return {"out": out.transpose(0, 2, 1, 3), "lse": lse}

    def _out_and_lse(self, arrays: Arrays) -> Outputs:
        batch, heads, length, _ = arrays["query"].shape
        dtype = arrays["query"].dtype
        return {
            "out": ((batch, length, heads, self.features.value_dim), dtype),
            "lse": ((batch, heads, length), mx.float32),
        }

    def _decode(self, arrays: Arrays) -> Arrays:
        tile = self.plan.decode
        assert tile is not None
        batch, heads, length, _ = arrays["query"].shape
        together = tile.block_queries // length
        shape = Shape.of(tile, query_rows=tile.block_queries, heads_together=together, splits=tile.splits)
        arrays = self._with_block_bounds(arrays, length)
        grid = (tile.splits, heads // together, batch)
        outputs = self._out_and_lse(arrays)
        if tile.splits == 1:
            out, lse = self._launch("decode", shape, arrays, _FORWARD, outputs, grid)
            return {"out": out.transpose(0, 2, 1, 3), "lse": lse}
        partial = {
            "partial_output": ((batch, heads, length, tile.splits, self.features.value_dim), mx.float32),
            "partial_statistics": ((batch, heads, length, tile.splits, 2), mx.float32),
        }
        without_sinks = {name: array for name, array in arrays.items() if name != "sinks"}
        found = self._launch("decode", shape, without_sinks, _FORWARD, partial, grid)
        arrays = arrays | dict(zip(partial, found, strict=True))
        combine = Shape(block_queries=1, block_keys=1, simdgroups=1, splits=tile.splits)
        names = ("partial_output", "partial_statistics", "sinks")
        out, lse = self._launch("decode_combine", combine, arrays, names, outputs, (length, heads, batch))
        return {"out": out.transpose(0, 2, 1, 3), "lse": lse}

    def _delta(self, arrays: Arrays) -> mx.array:
        batch, heads, length, _ = arrays["out"].shape
        shape = Shape(block_queries=1, block_keys=1, simdgroups=8)
        (delta,) = self._launch(
            "delta", shape, arrays, ("out", "output_gradient", "lse", "lse_gradient"),
            {"delta": ((batch, heads, length), mx.float32)}, (-(-length // shape.simdgroups), heads, batch),
        )  # fmt: skip
        return delta

    def _query_gradient(self, arrays: Arrays) -> Arrays:
        shape = Shape.of(self.plan.dq)
        batch, heads, length, width = arrays["query"].shape
        blocks = -(-length // shape.block_queries)
        outputs: Outputs = {"query_gradient": ((batch, length, heads, width), arrays["query"].dtype)}
        if self.features.alibi:
            outputs["slope_gradient"] = ((batch, heads, blocks), mx.float32)
        found = self._launch(
            "query_gradient", shape, self._with_block_bounds(arrays, shape.block_queries), _BACKWARD, outputs,
            (blocks, heads, batch),
        )  # fmt: skip
        gradients = {"query": found[0].transpose(0, 2, 1, 3)}
        return gradients | {"alibi_slopes": found[1]} if self.features.alibi else gradients

    def _key_value_gradient(self, arrays: Arrays) -> Arrays:
        tile = self.plan.dkdv
        batch, heads, length, width = arrays["key"].shape
        grid = (-(-length // tile.block_keys), heads, batch)
        arrays = self._with_block_bounds(arrays, tile.block_queries)
        dtype = arrays["key"].dtype
        key = {"key_gradient": ((batch, length, heads, width), dtype)}
        value = {"value_gradient": ((batch, length, heads, self.features.value_dim), dtype)}
        if tile.passes == 1:
            found = self._launch("key_value_gradient", Shape.of(tile), arrays, _BACKWARD, key | value, grid)
        else:
            only_key, only_value = Shape.of(tile, compute_dv=False), Shape.of(tile, compute_dk=False)
            found = self._launch("key_value_gradient", only_key, arrays, _BACKWARD, key, grid)
            found += self._launch("key_value_gradient", only_value, arrays, _BACKWARD, value, grid)
        return {name: array.transpose(0, 2, 1, 3) for name, array in zip(("key", "value"), found, strict=True)}

    def _relative_bias_gradient(self, arrays: Arrays) -> mx.array:
        """Split over heads only: each launch sums over the whole batch."""
        problem = self.plan.problem
        shape = Shape.of(self.plan.dq)
        diagonals = problem.query_length + problem.key_length - 1
        found = []
        for kv_heads in _ranges(problem.kv_heads, self.plan.dq.dispatches):
            part = self._part(arrays, (0, problem.batch), kv_heads)
            heads = part["query"].shape[1]
            found += self._launch(
                "relative_bias_gradient", shape, self._with_block_bounds(part, shape.block_queries), _BACKWARD,
                {"relative_bias_gradient": ((heads, diagonals), mx.float32)},
                (-(-diagonals // shape.threads), heads, 1),
            )  # fmt: skip
        return _joined(found, axis=0)

    def _bias_gradient(self, arrays: Arrays, given: tuple[int, ...]) -> mx.array:
        problem = self.plan.problem
        whole = (problem.batch, problem.heads, problem.query_length, problem.key_length)
        padded = (1,) * (4 - len(given)) + tuple(given)
        batch, heads, queries, keys = (have != want for have, want in zip(padded, whole, strict=True))
        shape = Shape.of(self.plan.dq, reduce_batch=batch, reduce_heads=heads, reduce_queries=queries, reduce_keys=keys)
        arrays = self._part(arrays, (0, problem.batch), (0, problem.kv_heads))
        grid = (
            1 if keys else -(-problem.key_length // shape.block_keys),
            1 if queries else -(-problem.query_length // shape.block_queries),
            padded[0] * padded[1],
        )
        (gradient,) = self._launch(
            "bias_gradient", shape, self._with_block_bounds(arrays, shape.block_queries), _BACKWARD,
            {"bias_gradient": (padded, mx.float32)}, grid,
        )  # fmt: skip
        return gradient.reshape(given)


def _ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """0 .. count in at most `parts` ranges of nearly the same length."""
    parts = max(1, min(count, parts))
    edges = [count * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


def _joined(arrays: list[mx.array], axis: int) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=axis)
