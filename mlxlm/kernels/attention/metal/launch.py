"""Running the kernels: arguments, grids, and the split of a call over several launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlxlm.kernels.attention.launches import DELTA_ROWS, Part
from mlxlm.kernels.attention.metal.operands import Arrays, block_bounds, part_of, readable, readable_bias
from mlxlm.kernels.attention.metal.source import Features, Shape, kernel
from mlxlm.kernels.attention.plan import TilePlan

# Inputs in the order in which kernels take them; each kernel takes those that the call has.
_MATRICES = ("query", "key", "value")
_MASK = ("row_bounds", "block_bounds", "prefix", "query_segments", "key_segments")
_TERMS = ("alibi_slopes", "query_offset", "relative_bias", "bias", "dropout_words")
_FORWARD = (*_MATRICES, *_MASK, *_TERMS, "sinks")
_BACKWARD = (*_MATRICES, "output_gradient", "lse", "delta", *_MASK, *_TERMS)

_FLOATS = ("alibi_slopes", "relative_bias", "sinks")
_READABLE = (*_MASK, *_FLOATS, "query_offset", "dropout_words", "lse", "delta", "lse_gradient")
_LN2 = 0.6931471805599453

Outputs = dict[str, tuple[tuple[int, ...], mx.Dtype]]  # name -> shape and dtype
Grid = tuple[int, int, int]
# Along which of its axes a result is put together from parts of the batch, of key heads, queries and keys. None: the
# parts are added up (or the kernel is never cut there).
Axes = tuple[int | None, int | None, int | None, int | None]
_ROWS: Axes = (0, 2, 1, None)  # (B, L, H, D)
_HEAD_ROWS: Axes = (0, 1, 2, None)  # (B, H, L)


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
            found = self._decode(arrays)
        else:
            found = self._split("forward", arrays, self._forward, {"out": _ROWS, "lse": _HEAD_ROWS})
        return found["out"].transpose(0, 2, 1, 3), found["lse"]

    def backward(
        self, inputs: Arrays, out: mx.array, lse: mx.array, out_gradient: mx.array, lse_gradient: mx.array
    ) -> Arrays:
        """Gradients of all inputs by name, float32 or in the dtype of the input.

        out, lse: of `forward`.  out_gradient, lse_gradient: with respect to the output and the natural log-sum-exp.
        """
        arrays = self._arrays(inputs) | {"output_gradient": out_gradient, "lse": lse}
        given = arrays | {"out": out, "lse_gradient": lse_gradient}
        arrays |= self._split("delta", given, self._delta, {"delta": _HEAD_ROWS})
        axes = {"query": _ROWS, "alibi_slopes": _HEAD_ROWS, "key": (0, 2, None, 1), "value": (0, 2, None, 1)}
        gradients = self._split("query_gradient", arrays, self._query_gradient, axes)
        gradients |= self._split("key_value_gradient", arrays, self._key_value_gradient, axes)
        gradients |= {name: gradients[name].astype(inputs[name].dtype).transpose(0, 2, 1, 3) for name in _MATRICES}
        if self.features.alibi:
            gradients["alibi_slopes"] = gradients["alibi_slopes"].sum((0, 2))
        if self.features.relative_bias:
            axes = {"relative_bias": (None, 0, None, None)}
            gradients |= self._split("relative_bias_gradient", arrays, self._relative_bias_gradient, axes)
        if self.features.bias:
            broadcast = self.plan.problem.bias_broadcast
            batch, heads, queries, keys = (None if same else axis for axis, same in enumerate(broadcast))
            axes = {"bias": (batch, heads, queries, keys)}
            found = self._split("bias_gradient", arrays, self._bias_gradient, axes)
            gradients["bias"] = found["bias"].reshape(inputs["bias"].shape)
        if self.features.sinks:
            # A sink is a score whose value is 0; where no key is seen the log-sum-exp is +inf and it counts nothing.
            weight = mx.exp(arrays["sinks"][:, None] - lse * _LN2)
            gradients["sinks"] = -(weight * arrays["delta"]).sum((0, 2))
        return gradients

    def _arrays(self, inputs: Arrays) -> Arrays:
        """All arrays of the call in the types that the kernels read."""
        problem = self.plan.problem
        arrays = dict(inputs) | self.constants
        for name in _FLOATS:
            if name in arrays:
                arrays[name] = arrays[name].astype(mx.float32)
        if "bias" in arrays:
            shape = (problem.batch, problem.heads, problem.query_length, problem.key_length)
            arrays["bias"] = mx.broadcast_to(arrays["bias"], shape)
        return arrays

    # ------------------------------------------------------------------------------------------------ launches

    def _split(
        self, kernel: str, arrays: Arrays, run: Callable[[Arrays, Part], Arrays], axes: dict[str, Axes]
    ) -> Arrays:
        """Run a kernel in the launches that the plan has for it, and put together what they give. axes: by result."""
        problem, parts = self.plan.problem, self.plan.parts(kernel)
        found = [run(part_of(arrays, part, problem), part) for part in parts]
        # Those that differ in their keys only are neighbours, then those that differ in their queries ...
        for axis in reversed(range(4)):
            count = len({tuple(vars(part).values())[axis] for part in parts})
            rows = [found[start : start + count] for start in range(0, len(found), count)]
            found = [{name: _joined([part[name] for part in row], axes[name][axis]) for name in row[0]} for row in rows]
        return found[0]

    def _launch(
        self, name: str, shape: Shape, arrays: Arrays, inputs: tuple[str, ...], outputs: Outputs, grid: Grid
    ) -> list[mx.array]:
        """Run a kernel. inputs: names, those of them that `arrays` holds are passed.  grid: in threadgroups."""
        names = tuple(n for n in inputs if n in arrays)
        if "bias" in names:
            arrays = arrays | {"bias": readable_bias(arrays["bias"])}
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

    def _forward(self, arrays: Arrays, part: Part) -> Arrays:
        shape, outputs = Shape.of(self.plan.forward), self._out_and_lse(arrays)
        batch, heads, length, _ = arrays["query"].shape
        found = self._launch(
            "forward", shape, self._with_block_bounds(arrays, shape.block_queries), _FORWARD, outputs,
            (-(-length // shape.block_queries), heads, batch),
        )  # fmt: skip
        return dict(zip(outputs, found, strict=True))

    def _out_and_lse(self, arrays: Arrays) -> Outputs:
        batch, heads, length, _ = arrays["query"].shape
        dtype = arrays["query"].dtype
        return {
            "out": ((batch, length, heads, self.features.value_dim), dtype),
            "lse": ((batch, heads, length), mx.float32),
        }

    def _decode(self, arrays: Arrays) -> Arrays:
        assert self.plan.decode is not None
        if self.plan.decode.splits == 1:
            return self._split("decode", arrays, self._decode_part, {"out": _ROWS, "lse": _HEAD_ROWS})
        axes: dict[str, Axes] = {"partial_output": (0, 1, None, 3), "partial_statistics": (0, 1, None, 3)}
        without_sinks = {name: array for name, array in arrays.items() if name != "sinks"}
        found = self._split("decode", without_sinks, self._decode_part, axes)
        batch, heads, length, splits, _ = found["partial_output"].shape
        combine = Shape(block_queries=1, block_keys=1, simdgroups=1, splits=splits)
        names, outputs = (*axes, "sinks"), self._out_and_lse(arrays)
        results = self._launch("decode_combine", combine, arrays | found, names, outputs, (length, heads, batch))
        return dict(zip(outputs, results, strict=True))

    def _decode_part(self, arrays: Arrays, part: Part) -> Arrays:
        """Output and log-sum-exp, or what each split of the keys gives towards them."""
        tile = self.plan.decode
        assert tile is not None
        batch, heads, length, _ = arrays["query"].shape
        together = tile.block_queries // length
        shape = Shape.of(tile, query_rows=tile.block_queries, heads_together=together, splits=tile.splits)
        outputs = self._out_and_lse(arrays) if tile.splits == 1 else {
            "partial_output": ((batch, heads, length, tile.splits, self.features.value_dim), mx.float32),
            "partial_statistics": ((batch, heads, length, tile.splits, 2), mx.float32),
        }  # fmt: skip
        arrays = self._with_block_bounds(arrays, length)
        found = self._launch("decode", shape, arrays, _FORWARD, outputs, (tile.splits, heads // together, batch))
        return dict(zip(outputs, found, strict=True))

    def _delta(self, arrays: Arrays, part: Part) -> Arrays:
        batch, heads, length, _ = arrays["out"].shape
        shape = Shape(block_queries=1, block_keys=1, simdgroups=DELTA_ROWS)
        (delta,) = self._launch(
            "delta", shape, arrays, ("out", "output_gradient", "lse", "lse_gradient"),
            {"delta": ((batch, heads, length), mx.float32)}, (-(-length // shape.simdgroups), heads, batch),
        )  # fmt: skip
        return {"delta": delta}

    def _query_gradient(self, arrays: Arrays, part: Part) -> Arrays:
        shape = Shape.of(self.plan.dq, partial=self.plan.split("query_gradient").keys > 1)
        batch, heads, length, width = arrays["query"].shape
        blocks = -(-length // shape.block_queries)
        dtype = mx.float32 if shape.partial else arrays["query"].dtype
        outputs: Outputs = {"query_gradient": ((batch, length, heads, width), dtype)}
        if self.features.alibi:
            outputs["slope_gradient"] = ((batch, heads, blocks), mx.float32)
        found = self._launch(
            "query_gradient", shape, self._with_block_bounds(arrays, shape.block_queries), _BACKWARD, outputs,
            (blocks, heads, batch),
        )  # fmt: skip
        return dict(zip(("query", "alibi_slopes"), found, strict=False))

    def _key_value_gradient(self, arrays: Arrays, part: Part) -> Arrays:
        tile = self.plan.dkdv
        batch, heads, length, width = arrays["key"].shape
        grid = (-(-length // tile.block_keys), heads, batch)
        arrays = self._with_block_bounds(arrays, tile.block_queries)
        partial = self.plan.split("key_value_gradient").queries > 1
        dtype = mx.float32 if partial else arrays["key"].dtype
        key = {"key_gradient": ((batch, length, heads, width), dtype)}
        value = {"value_gradient": ((batch, length, heads, self.features.value_dim), dtype)}
        if tile.passes == 1:
            shape = Shape.of(tile, partial=partial)
            found = self._launch("key_value_gradient", shape, arrays, _BACKWARD, key | value, grid)
        else:
            only_key = Shape.of(tile, partial=partial, compute_dv=False)
            only_value = Shape.of(tile, partial=partial, compute_dk=False)
            found = self._launch("key_value_gradient", only_key, arrays, _BACKWARD, key, grid)
            found += self._launch("key_value_gradient", only_value, arrays, _BACKWARD, value, grid)
        return dict(zip(("key", "value"), found, strict=True))

    def _relative_bias_gradient(self, arrays: Arrays, part: Part) -> Arrays:
        """The share of a part, in a table of all diagonals."""
        problem, shape = self.plan.problem, Shape.of(self.plan.dq)
        heads, length = arrays["query"].shape[1:3]
        diagonals = length + problem.key_length - 1
        (share,) = self._launch(
            "relative_bias_gradient", shape, self._with_block_bounds(arrays, shape.block_queries), _BACKWARD,
            {"relative_bias_gradient": ((heads, diagonals), mx.float32)},
            (-(-diagonals // shape.threads), heads, 1),
        )  # fmt: skip
        if length < problem.query_length:
            share = mx.pad(share, ((0, 0), (problem.query_length - part.queries[1], part.queries[0])))
        return {"relative_bias": share}

    def _bias_gradient(self, arrays: Arrays, part: Part) -> Arrays:
        """The gradient of a bias, summed over the axes that it is broadcast along: four axes."""
        batch, heads, queries, keys = self.plan.problem.bias_broadcast
        shape = Shape.of(self.plan.dq, reduce_batch=batch, reduce_heads=heads, reduce_queries=queries, reduce_keys=keys)
        whole = (*arrays["query"].shape[:3], arrays["key"].shape[2])
        own = tuple(1 if same else size for size, same in zip(whole, self.plan.problem.bias_broadcast, strict=True))
        grid = (-(-own[3] // shape.block_keys), -(-own[2] // shape.block_queries), own[0] * own[1])
        (gradient,) = self._launch(
            "bias_gradient", shape, self._with_block_bounds(arrays, shape.block_queries), _BACKWARD,
            {"bias_gradient": (own, mx.float32)}, grid,
        )  # fmt: skip
        return {"bias": gradient}


def _joined(arrays: list[mx.array], axis: int | None) -> mx.array:
    """The arrays concatenated along an axis, or their sum."""
    if len(arrays) == 1:
        return arrays[0]
    return sum(arrays[1:], arrays[0]) if axis is None else mx.concatenate(arrays, axis=axis)
