"""Weights as other toolkits pack them: GPTQ, AWQ, and floats of 8 bits with scales, seen as plain or MLX tensors.

A packed module X has several tensors on disk. `unpacked` gives a checkpoint in which each is the one tensor X.weight:
of MLX's affine form where that holds exactly the same values, else floats.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) as AutoGPTQ stores it, value = scale * (q - zero), for a weight of `out`
rows and `in` columns: qweight (in * bits / 32, out) int32, consecutive inputs from the low bits up; scales
(groups, out); qzeros (groups, out * bits / 32), the same packing along the outputs, one less than the zero in its first
format; g_idx (in,): the group of each input.
AWQ (Lin et al. 2023, arXiv:2306.00978) as AutoAWQ's "gemm" kernels have it: qweight (in, out / 8), qzeros
(groups, out / 8), where eight outputs stand in a word in the order 0 2 4 6 1 3 5 7; scales (groups, out).
Floats of 8 bits: weight, and weight_scale_inv or weight_scale: one value, one an output, or one a block of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlm.checkpoint.quantization import PACKINGS, Quantization
from mlxlm.checkpoint.small_floats import NAMES
from mlxlm.checkpoint.tensors import Checkpoint, TensorInfo
from mlxlm.errors import CheckpointError, ConfigError, UnsupportedModelError, listing

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GROUP_SIZES = (128, 64, 32)
# Of floats of 8 bits: the names of scales, and scales of activations, which exact products don't need.
_SCALES = ("weight_scale_inv", "weight_scale")
_UNUSED = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale", "bias_placeholder")
Read = Callable[[str], dict[str, mx.array]]


@dataclass(frozen=True)
class _Packed:
    """A module's one tensor.  info: of X.weight.  parts: names on disk.  read: the arrays that it becomes."""

    info: TensorInfo
    parts: tuple[str, ...]
    read: Callable[[dict[str, mx.array]], dict[str, mx.array]]


def unpacked(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint itself, or where its config.json names another toolkit's quantization, a view without it.

    config: the whole config.json.
    Raises ConfigError for settings that are not known, UnsupportedModelError for a layout that can't be read,
    CheckpointError for modules of which parts are missing or have the wrong shape.
    """
    if config.get("quantization") is not None:  # converted to MLX since
        return checkpoint
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method in ("gptq", "awq"):
        modules = _integer_modules(checkpoint, settings, method)
    elif method in PACKINGS or any(info.dtype in NAMES for info in checkpoint.tensors.values()):
        modules = _float_modules(checkpoint, settings or {})
    else:
        return checkpoint
    if method is not None and not modules:
        raise CheckpointError(
            f"quantization_config of config.json says {method!r}, but the checkpoint holds no such weights; remove the "
            "entry if they are plain ones"
        )
    return _view(checkpoint, modules)


def _view(checkpoint: Checkpoint, modules: list[_Packed]) -> Checkpoint:
    """The checkpoint with the parts of each module replaced by the one tensor, which stands at the first's place."""
    first = {module.parts[0]: module for module in modules}
    hidden = {part for module in modules for part in module.parts}
    hidden |= {name for name in checkpoint.tensors if modules and name.rpartition(".")[2] in _UNUSED}
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        shown = first[name].info if name in first else info
        if name in first or name not in hidden:
            tensors[shown.name] = shown
    by_name = {module.info.name: module for module in modules}

    def read(wanted: list[TensorInfo]) -> dict[str, mx.array]:
        arrays: dict[str, mx.array] = {}
        for info in wanted:
            module = by_name.get(info.name)
            if module is None:
                arrays |= checkpoint.load([info.name])
            else:
                arrays |= module.read(checkpoint.load(module.parts))
        return arrays

    return Checkpoint(tensors, checkpoint.metadata, read)


# ---------------------------------------------------------------------------------------------------- GPTQ and AWQ


@dataclass(frozen=True)
class _Form:
    """How a module's integers are packed.  bits: of one.  group_size: inputs that share a scale.

    awq: AWQ's order.  zero_offset: added to the stored zeros.
    """

    bits: int
    group_size: int
    awq: bool
    zero_offset: int


def _integer_modules(checkpoint: Checkpoint, settings: Mapping[str, Any], method: str) -> list[_Packed]:
    form = _form(settings, method)
    modules, problems = [], []
    for name in checkpoint.tensors:
        path, _, kind = name.rpartition(".")
        if kind != "qweight":
            continue
        try:
            modules.append(_integer_module(checkpoint, path, form))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"{method} weights that can't be read: {listing(problems, 5)}")
    return modules


def _form(settings: Mapping[str, Any], method: str) -> _Form:
    bits = settings.get("bits", settings.get("w_bit", 4))
    group_size = settings.get("group_size", settings.get("q_group_size", 128))
    for key, value in (("bits", bits), ("group_size", group_size)):
        if type(value) is not int:
            raise ConfigError(f"quantization_config of config.json: {key} is {value!r}, not a whole number")
    if bits not in ((4,) if method == "awq" else (2, 3, 4, 8)) or (group_size != -1 and group_size < 1):
        raise UnsupportedModelError(f"{method} with {bits} bits in groups of {group_size} is not implemented")
    if method == "awq":
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise UnsupportedModelError(f"AWQ weights of version {version!r} can't be read, only 'gemm'")
        return _Form(bits, group_size, True, 0)
    layout = settings.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"GPTQ weights of checkpoint_format {layout!r} can't be read, only gptq, gptq_v2")
    return _Form(bits, group_size, False, 1 if layout == "gptq" else 0)


def _integer_module(checkpoint: Checkpoint, path: str, form: _Form) -> _Packed:
    names = [f"{path}.{kind}" for kind in ("qweight", "qzeros", "scales")]
    missing = [name for name in names if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{path} lacks {listing(missing)}")
    weight, zeros, scales = (checkpoint.tensors[name] for name in names)
    if not all(len(info.shape) == 2 for info in (weight, zeros, scales)):
        raise CheckpointError(f"the parts of {path} aren't matrices")
    words = 32 // form.bits if form.bits != 3 else None
    groups, outputs = scales.shape
    inputs = weight.shape[0] if form.awq else weight.shape[0] * 32 // form.bits
    packed_outputs = outputs * form.bits // 32
    shapes = (inputs, packed_outputs) if form.awq else (inputs * form.bits // 32, outputs), (groups, packed_outputs)
    size = inputs if form.group_size == -1 else form.group_size
    fits = weight.shape == shapes[0] and zeros.shape == shapes[1] and groups == -(-inputs // size)
    if not fits or outputs * form.bits % 32 or (words and inputs % words):
        raise CheckpointError(
            f"{path}: qweight {weight.shape}, qzeros {zeros.shape} and scales {scales.shape} aren't "
            f"{form.bits} bits in groups of {form.group_size}"
        )
    if any(checkpoint.tensors[name].dtype not in ("int32", "uint32") for name in names[:2]):
        raise CheckpointError(f"{path}: qweight and qzeros aren't int32")
    order = None
    if f"{path}.g_idx" in checkpoint.tensors:
        names.append(f"{path}.g_idx")
        order = _order(checkpoint, path, inputs, groups, size)
    target = None if order is not None else _affine(form.bits, size, inputs)
    info = TensorInfo(
        name=f"{path}.weight",
        shape=(outputs, inputs),
        dtype=f"{'AWQ' if form.awq else 'GPTQ'} {form.bits} bit",
        file=weight.file,
        nbytes=sum(checkpoint.tensors[name].nbytes for name in names),
        quantization=target,
    )
    return _Packed(info, tuple(names), partial(_read_integers, path=path, form=form, order=order, target=target))


def _order(checkpoint: Checkpoint, path: str, inputs: int, groups: int, size: int) -> np.ndarray | None:
    """The group of each input, None when they are simply consecutive."""
    name = f"{path}.g_idx"
    order = np.array(checkpoint.load([name])[name])
    if order.shape != (inputs,) or order.dtype.kind not in "iu" or order.min() < 0 or order.max() >= groups:
        raise CheckpointError(f"{name} doesn't give {inputs} inputs one of {groups} groups each")
    return None if np.array_equal(order, np.arange(inputs) // size) else order


def _affine(bits: int, size: int, inputs: int) -> Quantization | None:
    """MLX's form for groups of `size`: a larger group is several of MLX's with the same scale."""
    fitting = [own for own in _GROUP_SIZES if size % own == 0 and inputs % own == 0]
    return Quantization(bits, fitting[0]) if fitting else None


def _read_integers(
    arrays: dict[str, mx.array], *, path: str, form: _Form, order: np.ndarray | None, target: Quantization | None
) -> dict[str, mx.array]:
    weight, zeros, scales = (np.array(arrays[f"{path}.{kind}"]) for kind in ("qweight", "qzeros", "scales"))
    if form.awq:
        values = _awq_integers(weight).T
        zeros = _awq_integers(zeros)
    else:
        values = _integers(np.ascontiguousarray(weight.T), form.bits)
        zeros = _integers(zeros, form.bits)
    # A stored zero of all ones is -1: the sum wraps around within the bits, as the kernels of AutoGPTQ have it.
    zeros = (zeros.astype(np.int32) + form.zero_offset) & ((1 << form.bits) - 1 if form.zero_offset else 0xFF)
    scales, zeros = scales.T.astype(np.float32), zeros.T.astype(np.float32)  # (out, groups)
    inputs = values.shape[1]
    if target is None:
        size = -(-inputs // scales.shape[1])
        group = np.arange(inputs) // size if order is None else order
        return {f"{path}.weight": mx.array((values - zeros[:, group]) * scales[:, group])}
    repeats = inputs // target.group_size // scales.shape[1]
    biases = np.repeat(-scales * zeros, repeats, axis=1)
    scales = np.repeat(scales, repeats, axis=1)
    # In float32 scale * q + bias is exactly scale * (q - zero); in 16 bits only where the bias has no more digits.
    half = biases.astype(np.float16)
    if np.array_equal(half.astype(np.float32), biases) and np.array_equal(scales.astype(np.float16), scales):
        scales, biases = scales.astype(np.float16), half
    return {
        f"{path}.weight": mx.array(pack_integers(values, form.bits)),
        f"{path}.scales": mx.array(scales),
        f"{path}.biases": mx.array(biases),
    }


def _integers(words: np.ndarray, bits: int) -> np.ndarray:
    """Integers (n, m * 32 / bits) uint8 of 32-bit words (n, m): one stream of bits a row, from the low bits up."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)


def pack_integers(values: np.ndarray, bits: int) -> np.ndarray:
    """The inverse, and MLX's packing: (n, m) integers below 2 ** bits to (n, m * bits / 32) uint32."""
    stream = (values.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(len(values), -1), axis=1, bitorder="little").view(np.uint32)


def _awq_integers(words: np.ndarray) -> np.ndarray:
    """Integers (n, m * 8) of words (n, m), eight to a word in AWQ's order."""
    integers = _integers(words, 4).reshape(len(words), -1, 8)
    return integers[:, :, np.argsort(_AWQ_ORDER)].reshape(len(words), -1)


# ---------------------------------------------------------------------------------------------------- floats of 8 bits


def _float_modules(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> list[_Packed]:
    tensors = checkpoint.tensors
    foreign = [name for name in tensors if name.endswith((".weight_packed", ".weight_zero_point"))]
    if foreign:
        raise UnsupportedModelError(
            f"compressed-tensors in a packed format can't be read (such as {foreign[0]}); only floats of 8 bits can"
        )
    block = settings.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)):
        raise ConfigError(f"quantization_config of config.json: weight_block_size is {block!r}, not two whole numbers")
    modules, problems = [], []
    for name, info in tensors.items():
        path, _, kind = name.rpartition(".")
        scale = next((f"{path}.{kind}" for kind in _SCALES if f"{path}.{kind}" in tensors), None)
        if kind != "weight" or info.dtype not in NAMES or scale is None:
            continue
        sides = _scale_sides(info.shape, tensors[scale].shape, block)
        if sides is None:
            problems.append(f"{scale} {tensors[scale].shape} doesn't fit {name} {info.shape}")
            continue
        shown = TensorInfo(
            name=name, shape=info.shape, dtype=info.dtype, file=Path(info.file), nbytes=info.nbytes, position=0
        )
        modules.append(_Packed(shown, (name, scale), partial(_scaled, name=name, scale=scale, sides=sides)))
    if problems:
        raise CheckpointError(f"scales that don't fit their weights: {listing(problems, 5)}")
    return modules


def _scale_sides(weight: tuple[int, ...], scale: tuple[int, ...], block: list[int] | None) -> tuple[int, int] | None:
    """Rows and columns of the weight that share a scale; None when the shapes don't belong together."""
    if len(weight) != 2 or not all(weight):
        return None
    if scale in ((), (1,), (1, 1)):
        return weight
    if scale in ((weight[0],), (weight[0], 1)):
        return (1, weight[1])
    if len(scale) != 2 or not all(scale):
        return None
    sides = tuple(block) if block is not None else tuple(-(-n // count) for n, count in zip(weight, scale, strict=True))
    counts = tuple(-(-n // max(side, 1)) for n, side in zip(weight, sides, strict=True))
    return sides if counts == scale else None


def _scaled(arrays: dict[str, mx.array], *, name: str, scale: str, sides: tuple[int, int]) -> dict[str, mx.array]:
    """weight * scale in float32, block by block."""
    weight, factor = arrays[name], arrays[scale].astype(mx.float32)
    rows, columns = weight.shape
    factor = factor.reshape(-(-rows // sides[0]), -(-columns // sides[1]))
    factor = mx.repeat(mx.repeat(factor, sides[0], axis=0)[:rows], sides[1], axis=1)[:, :columns]
    return {name: weight * factor}
