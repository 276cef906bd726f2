"""Are MLX's fused norms right on this device? Outputs and all gradients against the formulas in float64.

The layers rely on `mx.fast.layer_norm` and `mx.fast.rms_norm`, whose GPU kernels are chosen by width and type and have
been wrong for some of them: on Metal the sum for the bias raced with the kernel that writes over what it reads
(mlx#3630), on CUDA rows of some hundred features were mixed up in RMSNorm (mlx#3792). So widths on both sides of what
the kernels treat alike are tried, several times each. `mlxlm doctor` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxlm.kernels.attention.selfcheck import LIMITS, Check

EPS = 1e-3
REPETITIONS = 4  # a race may be won now and then
_WIDTHS = {"float32": (5, 64, 130, 257, 512, 768, 1000, 4100), "float16": (5, 300, 1024), "bfloat16": (5, 300, 1024)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One norm: kind "layer_norm" or "rms_norm", its width, whether it has a shift, and how many rows it is given."""

    kind: str
    width: int
    dtype: str
    bias: bool
    rows: int = 37

    @property
    def name(self) -> str:
        """As the report calls it."""
        return f"width {self.width} {self.dtype}{'' if self.bias or self.kind == 'rms_norm' else ' without bias'}"


CASES = tuple(
    Case(kind=kind, width=width, dtype=dtype, bias=bias)
    for kind, bias in (("layer_norm", True), ("layer_norm", False), ("rms_norm", False))
    for dtype, widths in _WIDTHS.items()
    for width in widths
)


def run(cases: tuple[Case, ...] = CASES) -> Iterator[Check]:
    """Check the norms one case after another, to the first that MLX doesn't survive: nothing can be computed then."""
    for case in cases:
        given = _arrays(case)
        exact = formula(case.kind, {name: np.array(array, dtype=np.float64) for name, array in given.items()})
        worst, where = 0.0, ""
        try:
            results = [_results(case, given) for _ in range(REPETITIONS)]
        except RuntimeError as error:  # on CUDA an access outside of an array ends the process's use of the device
            text = f"{' '.join(str(error).split())[:200]}; the cases after it were left out"
            yield Check(case=case.name, implementation=f"mx.fast.{case.kind}", error=None, problem=text)
            return
        for name, found in ((name, found) for result in results for name, found in result.items()):
            away = _error(found, exact[name])
            if not away <= worst:  # NaN is worst
                worst, where = away, name
        problem = "" if worst <= LIMITS[case.dtype] else f"{where}: relative error {worst:.1e}"
        yield Check(case=case.name, implementation=f"mx.fast.{case.kind}", error=worst, problem=problem)


def formula(kind: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output, and the gradients of what is given, for a loss whose gradient by the output is `cotangent`.

    given: input (rows, width), weight (width,), perhaps bias (width,), and cotangent (rows, width).
    """
    centred = given["input"] - given["input"].mean(-1, keepdims=True) if kind == "layer_norm" else given["input"]
    factor = 1.0 / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    normed, scaled = centred * factor, given["cotangent"] * given["weight"]
    gradient = scaled - normed * (scaled * normed).mean(-1, keepdims=True)
    if kind == "layer_norm":
        gradient = gradient - scaled.mean(-1, keepdims=True)
    found = {
        "output": normed * given["weight"] + given.get("bias", 0.0),
        "gradient of the input": factor * gradient,
        "gradient of the weight": (given["cotangent"] * normed).sum(0),
    }
    return found | ({"gradient of the bias": given["cotangent"].sum(0)} if "bias" in given else {})


def _arrays(case: Case) -> dict[str, mx.array]:
    """Inputs of a case, float32 but rounded to its type, so that formula and kernel see the same."""
    rng = np.random.default_rng(case.width)
    shapes = {"input": (case.rows, case.width), "weight": (case.width,), "cotangent": (case.rows, case.width)}
    if case.bias:
        shapes["bias"] = (case.width,)
    arrays = {name: mx.array(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}
    arrays["input"] = arrays["input"] + 0.5
    return {name: array.astype(getattr(mx, case.dtype)).astype(mx.float32) for name, array in arrays.items()}


def _results(case: Case, given: dict[str, mx.array]) -> dict[str, np.ndarray]:
    """What MLX makes of it, under the names of `formula`."""
    dtype = getattr(mx, case.dtype)
    names = [name for name in ("input", "weight", "bias") if name in given]

    def norm(*arrays: mx.array) -> mx.array:
        # Computed here, as in a model, so that MLX may reuse the memory of the input.
        x, weight = arrays[0] * 1.0, arrays[1]
        if case.kind == "rms_norm":
            return mx.fast.rms_norm(x, weight, EPS)
        return mx.fast.layer_norm(x, weight, arrays[2] if case.bias else None, EPS)

    cotangent = given["cotangent"].astype(dtype) * 1.0
    outputs, gradients = mx.vjp(norm, [given[name].astype(dtype) for name in names], [cotangent])
    del cotangent  # nobody else holds it now
    found = dict(zip((f"gradient of the {name}" for name in names), gradients, strict=True)) | {"output": outputs[0]}
    mx.eval(found)
    return {name: np.array(array.astype(mx.float32), dtype=np.float64) for name, array in found.items()}


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    """Largest difference over the largest number."""
    return float(np.abs(found - exact).max() / np.abs(exact).max())
