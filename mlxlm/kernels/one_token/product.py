"""One token's vector times a weight, with what stands before and after it in the same kernel."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxlm.kernels.one_token.source import Constants, chunk, launch

# Simdgroups of a threadgroup: more where they share what is prepared in threadgroup memory, of which all GPUs have
# that many bytes.
_SIMDGROUPS, _SIMDGROUPS_STAGED = 4, 8
_THREADGROUP_BYTES = 32768

# MLX hands smaller arrays to a Metal kernel in another address space.
_LEAST_ELEMENTS = 8

# Each as an expression of Metal and of CUDA. The exact GELU is missing: Metal has no error function.
_TANH = "(1.0f - 2.0f / (exp(2.0f * ({})) + 1.0f))"
ACTIVATIONS = {
    "identity": "x",
    "relu": "max(x, 0.0f)",
    "squared_relu": "max(x, 0.0f) * max(x, 0.0f)",
    "sigmoid": "1.0f / (1.0f + exp(-x))",
    "silu": "x / (1.0f + exp(-x))",
    "tanh": _TANH.format("x"),
    "gelu_tanh": f"0.5f * x * (1.0f + {_TANH.format('0.7978845608028654f * (x + 0.044715f * x * x * x)')})",
    "gelu_sigmoid": "x / (1.0f + exp(-1.702f * x))",
}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A linear layer's arrays. weight: (outputs, inputs), or packed as MLX's affine quantization has it.

    scales, biases: of the quantization, (outputs, inputs / group_size).  bias: (outputs,), default none.
    bits: 0 for a float weight, 4 or 8.  group_size: numbers that share a scale.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bias: mx.array | None = None
    bits: int = 0
    group_size: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, packed = self.weight.shape
        return outputs, packed * 32 // self.bits if self.bits else packed

    def problem(self, dtype: mx.Dtype) -> str:
        """Why the kernels don't take it with activations of that dtype, empty when they do."""
        outputs, inputs = self.shape
        arrays = [a for a in (self.weight if not self.bits else None, self.scales, self.biases, self.bias)
                  if a is not None]  # fmt: skip
        if any(array.dtype != dtype for array in arrays):
            return f"a weight is not {dtype} as the activations are"
        if self.bits not in (0, 4, 8) or (self.bits and (self.biases is None or self.group_size < 128 // self.bits)):
            return f"weights of {self.bits} bits in groups of {self.group_size} have no kernel"
        step = 128 // self.bits if self.bits else chunk(dtype)
        if inputs % step:
            return f"a weight of {outputs} x {inputs} has rows that are not a multiple of {step}"
        return ""

    def parts(self) -> dict[str, mx.array]:
        """The arrays by the names that the kernel has for them."""
        known = {"weight": self.weight, "scales": self.scales, "biases": self.biases, "bias": self.bias}
        return {name: array for name, array in known.items() if array is not None}


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm before a product. scale: (inputs,) float32.  eps: added to the mean square.

    rounded: whether the normed vector is rounded to the dtype before it is scaled, as `mx.fast.rms_norm` does.
    """

    scale: mx.array
    eps: float
    rounded: bool = True


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How queries, keys and values stand below each other in the rows of a weight, and how they are turned.

    num_heads, num_kv_heads, head_dim: of attention.  inverse: float32, the rotary frequencies of the first pairs of
    features; None turns nothing.  interleaved: whether features 2i and 2i + 1 are a pair, not i and i + rotated / 2.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    inverse: mx.array | None = None
    interleaved: bool = False


def product(
    x: mx.array,
    weight: Weight,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    gated: bool = False,
    added: mx.array | None = None,
) -> mx.array:
    """added + activation(weight @ norm(x)), (outputs,) of x (inputs,).

    gated: the first half of the rows is a gate: activation(gate) * up, (outputs / 2,).  added: (outputs,).
    x and the weight begin at a multiple of 16 bytes, as arrays of MLX do, and the rows that `Weight.problem` lets pass.
    Raises KeyError for an activation that is not in ACTIVATIONS.
    """
    constants: Constants = (
        ("GATED", int(gated)), ("HAS_HEADS", 0), ("HAS_ACTIVATION", int(activation is not None)),
        ("HAS_ADDED", int(added is not None)),
    )  # fmt: skip
    if activation is not None:
        line = f"METAL_FUNC float activate(float x) {{ return {ACTIVATIONS[activation]}; }}"
        constants = (*constants, ("activate", line))
    more = {} if added is None else {"added": added}
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    return _product(x, weight, norm, constants, more, {"out": outputs})[0]


def projected_heads(
    x: mx.array,
    weight: Weight,
    heads: Heads,
    position: mx.array,
    *,
    norm: Norm | None = None,
    head_norms: tuple[Norm, Norm] | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries (H * D,), keys and values (Hkv * D,) of x (inputs,); queries and keys are turned by position, (1,) int32.

    weight: (num_heads + 2 num_kv_heads) * head_dim rows.  head_norms: over each query's and each key's features, of one
    kind, before they are turned; in a kernel of its own.
    """
    rotated = 0 if heads.inverse is None else 2 * heads.inverse.size
    inverse = mx.zeros((0,)) if heads.inverse is None else heads.inverse
    if inverse.size < _LEAST_ELEMENTS:
        inverse = mx.concatenate([inverse, mx.zeros((_LEAST_ELEMENTS - inverse.size,))])
    constants: Constants = (
        ("HEAD_DIM", heads.head_dim), ("QUERY_HEADS", heads.num_heads), ("KEY_HEADS", heads.num_kv_heads),
        ("ROTATED", rotated), ("INTERLEAVED", int(heads.interleaved)),
    )  # fmt: skip
    placed = {"position": position, "inverse": inverse}
    width = heads.num_kv_heads * heads.head_dim
    sizes = {"query": heads.num_heads * heads.head_dim, "key": width, "value": width}
    if head_norms is None:
        own = (("GATED", 0), ("HAS_HEADS", 1), *constants)
        found = _product(x, weight, norm, own, placed, sizes)
        return found[0], found[1], found[2]
    of_query, of_key = head_norms
    inputs = {"heads": product(x, weight, norm=norm), "query_norm": of_query.scale, "key_norm": of_key.scale, **placed}
    own = (("SIMDGROUPS", _SIMDGROUPS), ("NORM_EPS", float(of_query.eps)), ("NORM_ROUNDED", int(of_query.rounded)))
    threadgroups = -(-(heads.num_heads + 2 * heads.num_kv_heads) // _SIMDGROUPS)
    shapes = {name: (size,) for name, size in sizes.items()}
    found = launch(
        "turn", x.dtype, (*own, *constants), inputs, shapes, threadgroups=(threadgroups, 1), simdgroups=_SIMDGROUPS
    )
    return found[0], found[1], found[2]


def _product(
    x: mx.array,
    weight: Weight,
    norm: Norm | None,
    constants: Constants,
    more: dict[str, mx.array],
    outputs: dict[str, int],
) -> list[mx.array]:
    rows, inputs = weight.shape
    parts = {"x": x, **weight.parts(), **more}
    span = 32 * (128 // weight.bits if weight.bits else chunk(x.dtype))
    fits = -(-inputs // span) * span * x.dtype.size <= _THREADGROUP_BYTES
    staged = fits and bool(weight.bits or norm is not None)
    simdgroups = _SIMDGROUPS_STAGED if staged else _SIMDGROUPS
    own: list[tuple[str, int | float | str]] = [
        ("INPUTS", inputs), ("OUTPUTS", rows), ("SIMDGROUPS", simdgroups), ("STAGED", int(staged)),
        ("BITS", weight.bits), ("GROUP_SIZE", weight.group_size),
        ("HAS_BIAS", int(weight.bias is not None)), ("HAS_NORM", int(norm is not None)),
    ]  # fmt: skip
    if norm is not None:
        parts["norm"] = norm.scale
        own += [("NORM_EPS", float(norm.eps)), ("NORM_ROUNDED", int(norm.rounded))]
    threadgroups = -(-rows // (2 * simdgroups))
    shapes = {name: (size,) for name, size in outputs.items()}
    return launch(
        "product", x.dtype, (*own, *constants), parts, shapes, threadgroups=(threadgroups, 1), simdgroups=simdgroups
    )
