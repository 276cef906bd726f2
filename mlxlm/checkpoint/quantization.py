"""Quantized weights in MLX's form: a packed weight, one scale and (affine mode) one bias a group of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxlm.errors import CheckpointError, ConfigError, UnsupportedModelError, listing, nearest
from mlxlm.runtime import backend

if TYPE_CHECKING:
    from mlxlm.checkpoint.tensors import Checkpoint

# Of each mode, as mx.quantize has them: the group sizes and the bits, the default first.
_MODES = {
    "affine": ((64, 32, 128), (4, 1, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
_PARAMETERS = ("group_size", "bits", "mode")
# Methods of other toolkits that packed.py reads.
PACKINGS = ("gptq", "awq", "fp8", "fbgemm_fp8", "compressed-tensors")


@dataclass(frozen=True)
class Quantization:
    """How one weight is quantized.

    bits: of one value.  group_size: consecutive values of a row that share a scale.  mode: "affine" (value = scale *
    integer + bias), or "mxfp4", "mxfp8", "nvfp4" (small floats times a shared scale, no bias).
    Raises ConfigError for a combination that MLX does not have.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in _MODES:
            raise ConfigError(f"unknown quantization mode {self.mode!r}{nearest(self.mode, _MODES)}")
        group_sizes, bits = _MODES[self.mode]
        for key, value, valid in (("group_size", self.group_size, group_sizes), ("bits", self.bits, bits)):
            if isinstance(value, bool) or not isinstance(value, int) or value not in valid:
                raise ConfigError(
                    f"quantization {key} is {value!r}; valid in {self.mode} mode: {listing(map(str, sorted(valid)))}"
                )

    @property
    def has_biases(self) -> bool:
        """Whether a weight has a third array, its biases."""
        return self.mode == "affine"

    def to_json(self) -> dict[str, Any]:
        """As config.json says it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class QuantizationConfig:
    """The "quantization" entry of an MLX config.json.

    default: of every module that nothing else is said about.  overrides: by module path ("model.layers.0.mlp.up_proj");
    None: not quantized.
    """

    default: Quantization
    overrides: Mapping[str, Quantization | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> QuantizationConfig | None:
        """From a whole config.json; None when the model isn't quantized.

        "quantization" counts; "quantization_config" is its copy, stands alone, or is what another toolkit's original
        had said before the conversion to MLX ("quant_method"), which no longer holds. An override is `false`, `true`
        (the default) or an object; keys missing there take MLX's defaults of the mode, as in mlx-lm, not the model's.
        Raises UnsupportedModelError for the method of another toolkit, ConfigError for unknown or contradicting keys.
        """
        own, copy = config.get("quantization"), config.get("quantization_config")
        foreign = isinstance(copy, Mapping) and "quant_method" in copy
        if own is None and foreign and copy["quant_method"] in PACKINGS:
            return None  # see `unpacked`
        if own is None and foreign:
            raise _foreign_method(str(copy["quant_method"]))
        parsed = [cls._parse_entry(key, entry) for key, entry in _mlx_entries(own, None if foreign else copy)]
        if len(parsed) == 2 and parsed[0] != parsed[1]:
            raise ConfigError('"quantization" and "quantization_config" of config.json contradict each other; keep one')
        return parsed[0] if parsed else None

    @classmethod
    def _parse_entry(cls, key: str, entry: Any) -> QuantizationConfig:
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{key!r} of config.json must be an object, not {entry!r}")
        default = _parse_parameters(key, {name: entry[name] for name in _PARAMETERS if name in entry})
        overrides: dict[str, Quantization | None] = {}
        for path, value in entry.items():
            if path in _PARAMETERS:
                continue
            if isinstance(value, Mapping):
                overrides[path] = _parse_parameters(f"{key}.{path}", value)
            elif isinstance(value, bool):
                overrides[path] = default if value else None
            else:
                valid = "group_size, bits, mode, or a module path with false, true or an object"
                raise ConfigError(f"unknown entry {path!r}: {value!r} in {key!r} of config.json; valid: {valid}")
        return cls(default, overrides)

    def for_module(self, path: str) -> Quantization | None:
        """How the module at `path` is quantized if its weight is quantized at all; None: it is said not to be."""
        return self.overrides.get(path, self.default)

    def to_json(self) -> dict[str, Any]:
        """The value of "quantization" (and of its copy "quantization_config") in config.json."""
        overrides = {path: False if value is None else value.to_json() for path, value in self.overrides.items()}
        return {**self.default.to_json(), **overrides}


def _mlx_entries(own: Any, copy: Any) -> list[tuple[str, Any]]:
    entries = (("quantization", own), ("quantization_config", copy))
    return [(key, entry) for key, entry in entries if entry is not None]


def _parse_parameters(where: str, given: Mapping[str, Any]) -> Quantization:
    for key in given:
        if key not in _PARAMETERS:
            raise ConfigError(f"unknown key {key!r} in {where!r} of config.json{nearest(key, _PARAMETERS)}")
    mode = given.get("mode", "affine")
    group_sizes, bits = _MODES[mode] if mode in list(_MODES) else ((None,), (None,))  # Quantization names the fault
    return Quantization(given.get("bits", bits[0]), given.get("group_size", group_sizes[0]), mode)


def _foreign_method(method: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the weights are quantized with {method!r}, which mlxlm doesn't read, only {', '.join(PACKINGS)}; use the "
        "original float16 or bfloat16 model, or one quantized for MLX (config.json then has a 'quantization' entry)"
    )


def quantized_modules(checkpoint: Checkpoint, config: QuantizationConfig | None) -> dict[str, Quantization]:
    """Module path -> quantization of every quantized weight that a checkpoint really holds, checked against shapes.

    config: of the model's config.json; None for GGUF, whose tensors say it themselves.
    Raises CheckpointError, naming all, when scales have no weight, when config.json does not say how a weight is
    quantized, or when what it says doesn't fit the shapes.
    """
    tensors = checkpoint.tensors
    modules: dict[str, Quantization] = {}
    problems = []
    for name, tensor in tensors.items():
        if tensor.quantization is not None:
            modules[name.removesuffix(".weight")] = tensor.quantization
        elif name.endswith(".scales"):
            path = name.removesuffix(".scales")
            quantization = config.for_module(path) if config else None
            weight, biases = tensors.get(path + ".weight"), tensors.get(path + ".biases")
            if weight is None:
                problems.append(f"{path} has scales but no weight")
            elif quantization is None:
                problems.append(f"{path} is quantized but config.json says not")
            elif not _fits(weight.shape, tensor.shape, quantization) or weight.dtype != "uint32":
                problems.append(
                    f"{path} ({weight.dtype} {weight.shape}, scales {tensor.shape}) isn't {quantization.bits} bits in "
                    f"groups of {quantization.group_size}"
                )
            elif quantization.has_biases and (biases is None or biases.shape != tensor.shape):
                problems.append(f"{path} lacks biases of shape {tensor.shape}")
            else:
                modules[path] = quantization
    if problems:
        raise CheckpointError(f"quantized weights don't fit config.json: {listing(problems, 10)}")
    return modules


def dequantize(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    quantization: Quantization,
    dtype: mx.Dtype,
    *,
    lazy: bool = False,
) -> mx.array:
    """The values of a quantized weight, computed in float32 and rounded once to `dtype`.

    weight: (..., n * bits / 32) uint32.  scales, biases: (..., n / group_size); biases None unless affine.
    Returns (..., n) of `dtype`. On the CPU backend affine weights of 4 and 8 bits are computed at once with numpy,
    several times as fast as MLX does it there, unless `lazy`; everything else is a lazy MLX array.
    Raises CheckpointError when the shapes don't belong together.
    """
    if not _fits(weight.shape, scales.shape, quantization) or (biases is None) == quantization.has_biases:
        given = "none" if biases is None else str(biases.shape)
        raise CheckpointError(
            f"weight {weight.shape}, scales {scales.shape} and biases {given} aren't a weight of "
            f"{quantization.bits} bits in groups of {quantization.group_size} ({quantization.mode} mode)"
        )
    # MLX's own function knows neither empty nor one-dimensional weights.
    if weight.size == 0:
        return mx.zeros((*scales.shape[:-1], scales.shape[-1] * quantization.group_size), dtype=dtype)
    if weight.ndim == 1:
        rows = (None if part is None else part[None] for part in (weight, scales, biases))
        return dequantize(*rows, quantization, dtype)[0]
    if biases is None:
        return mx.dequantize(weight, scales, None, dtype=mx.float32, **quantization.to_json()).astype(dtype)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    if quantization.bits in (4, 8) and backend() == "cpu" and not lazy:
        return _dequantize_with_numpy(weight, scales, biases, quantization).astype(dtype)
    return mx.dequantize(weight, scales, biases, **quantization.to_json()).astype(dtype)


def _fits(weight: tuple[int, ...], scales: tuple[int, ...], quantization: Quantization) -> bool:
    if not weight or not scales or weight[:-1] != scales[:-1]:
        return False
    return weight[-1] * 32 == scales[-1] * quantization.group_size * quantization.bits


# Groups computed at once: their bytes and floats stay in the second-level cache.
_GROUPS_AT_ONCE = 4096


def _dequantize_with_numpy(weight: mx.array, scales: mx.array, biases: mx.array, form: Quantization) -> mx.array:
    """value = scale * integer + bias for 4 and 8 bits; `scales` and `biases` are float32."""
    values = mx.zeros((*scales.shape[:-1], scales.shape[-1] * form.group_size), dtype=mx.float32)
    weight, scales, biases = (mx.contiguous(array) for array in (weight, scales, biases))
    mx.eval(values, weight, scales, biases)
    # The result is written in place, through numpy's view of its memory: a second copy of a large weight costs more
    # time (fresh pages) than the arithmetic. Nothing else refers to `values` yet.
    out = np.array(values, copy=False)
    assert out.flags.c_contiguous
    out = out.reshape(-1, form.group_size)
    packed = np.array(weight, copy=False).view(np.uint8).reshape(-1, form.group_size * form.bits // 8)
    scale, bias = (np.array(array, copy=False).reshape(-1, 1) for array in (scales, biases))
    for start in range(0, len(out), _GROUPS_AT_ONCE):
        rows = slice(start, start + _GROUPS_AT_ONCE)
        part = out[rows]
        part[...] = packed[rows] if form.bits == 8 else _halves(packed[rows])
        part *= scale[rows]
        part += bias[rows]
    return values


def _halves(packed: np.ndarray) -> np.ndarray:
    """The 4-bit integers of bytes (n, m), low half first, as bytes (n, 2m)."""
    pairs = packed.astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)
