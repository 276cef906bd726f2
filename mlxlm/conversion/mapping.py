"""What a conversion does with every tensor, known before any value is read.

The rules of the source's names lead to the canonical names inside the stack, those of the target's back to names on
disk. Tensors that depend on each other on the way (a fused projection and its parts) form one `Move`: it is all that
must be in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxlm.checkpoint import TensorInfo, dequantize
from mlxlm.errors import CheckpointError
from mlxlm.models import OpenedModel, Transformer
from mlxlm.models.weights import Rule, Translation, check, check_copies, hub_name, to_canonical, to_hub

# From the canonical arrays of one move to those that are stored, also by canonical names.
Change = Callable[[dict[str, mx.array]], dict[str, mx.array]]
_FLOATS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Move:
    """Tensors of the source that become tensors of the target.

    units: modules of the source, each the names of its tensors on disk.  targets: name on disk -> dtype and shape, as
    of the MLX array that is stored there; none for what carries nothing (buffers, copies of tied weights).
    parameters: numbers that the targets stand for.
    """

    units: tuple[tuple[str, ...], ...]
    targets: dict[str, tuple[mx.Dtype, tuple[int, ...]]]
    parameters: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """Names on disk in the source."""
        return tuple(name for unit in self.units for name in unit)


@dataclass(frozen=True, kw_only=True)
class Translator:
    """Hands out the tensors of an opened model under the names of a target.

    rules: of the target's names.  change: what is done to the canonical arrays in between.  keep: leave quantized
    modules packed, for `change` to pass on.  dtype: of all floats, None: each as it is on disk.  loose: of floats that
    have no dtype of their own there (quantized weights, floats of 8 bits, blocks of GGUF).
    """

    opened: OpenedModel
    rules: tuple[Rule, ...]
    change: Change
    keep: bool
    dtype: mx.Dtype | None
    loose: mx.Dtype

    def moves(self) -> list[Move]:
        """All moves, in the order of the source.

        Raises WeightsError that lists all tensors which don't fit the model.
        """
        units = self._units()
        floats = {unit: self._outline(unit, keep=False) for unit in units}
        translations = {unit: to_canonical(self.opened.rules, arrays) for unit, arrays in floats.items()}
        self._check(translations.values())
        groups = _Groups()
        for unit, translation in translations.items():
            names = [*translation.tensors, *(name for _, name in translation.copies.values())]
            groups.join([("unit", unit), *(("inside", name) for name in names)])
            for name in translation.tensors:
                groups.join([("inside", name), ("target", hub_name(self.rules, name))])
        together: dict[object, list[tuple[str, ...]]] = {}
        for unit in units:
            together.setdefault(groups.find(("unit", unit)), []).append(unit)
        return [self._move(tuple(group)) for group in together.values()]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of all float weights."""
        inside = self._inside(tuple(self._units()), keep=False)
        return {name: tuple(array.shape) for name, array in inside.items()}

    def read(self, move: Move) -> dict[str, mx.array]:
        """The move's tensors by their names in the target; lazy where the source's are.

        Raises CheckpointError for weights that are NaN, or too large for the dtype they are to have.
        """
        tensors: dict[str, mx.array] = {}
        for unit in move.units:
            tensors |= self._read(unit)
        translation = to_canonical(self.opened.rules, tensors)
        if self.opened.source.config.head is not None:
            check_copies(translation)
        for name, array in translation.tensors.items():
            if mx.issubdtype(array.dtype, mx.floating) and mx.isnan(array).any().item():
                raise CheckpointError(f"{translation.origins[name]} holds NaN: the source is damaged")
        return to_hub(self.rules, self.change(translation.tensors))

    # ------------------------------------------------------------------------------------------------ the source

    def _units(self) -> list[tuple[str, ...]]:
        """The tensors of each quantized module together, every other one alone."""
        tensors, units = self.opened.checkpoint.tensors, []
        for name, info in tensors.items():
            path, _, kind = name.rpartition(".")
            if path not in self.opened.quantizations or kind not in _PARTS or info.quantization is not None:
                units.append((name,))
            elif kind == "weight":
                units.append(tuple(part for kind in _PARTS if (part := f"{path}.{kind}") in tensors))
        return units

    def _path(self, unit: tuple[str, ...]) -> str | None:
        """The path of a quantized module, None for a plain tensor."""
        path, _, kind = unit[0].rpartition(".")
        return path if kind == "weight" and path in self.opened.quantizations else None

    def _outline(self, unit: tuple[str, ...], *, keep: bool) -> dict[str, mx.array]:
        """Arrays of the right dtypes and shapes that are never computed."""
        infos = [self.opened.checkpoint.tensors[name] for name in unit]
        path = self._path(unit)
        if path is None:
            return {info.name: mx.zeros(info.shape, self._dtype_of(info)) for info in infos}
        form = self.opened.quantizations[path]
        shape = infos[0].shape
        if len(infos) > 1:
            shape = (*infos[1].shape[:-1], infos[1].shape[-1] * form.group_size)
        if not keep:
            return {f"{path}.weight": mx.zeros(shape, self.dtype or self.loose)}
        words, groups = shape[-1] * form.bits // 32, shape[-1] // form.group_size
        # Scales of small floats are bytes; others as they are stored, which for GGUF is float16.
        scale = mx.uint8 if not form.has_biases else _FLOATS.get(infos[-1].dtype, mx.float16)
        outline = {f"{path}.weight": mx.zeros((*shape[:-1], words), mx.uint32)}
        outline[f"{path}.scales"] = mx.zeros((*shape[:-1], groups), scale)
        if form.has_biases:
            outline[f"{path}.biases"] = mx.zeros((*shape[:-1], groups), scale)
        return outline

    def _dtype_of(self, info: TensorInfo) -> mx.Dtype:
        if info.dtype in _FLOATS:
            return self.dtype or _FLOATS[info.dtype]
        own = getattr(mx, "bool_" if info.dtype == "bool" else info.dtype, None)
        return own if isinstance(own, mx.Dtype) and info.dtype != "float64" else self.dtype or self.loose

    def _read(self, unit: tuple[str, ...]) -> dict[str, mx.array]:
        arrays, tensors = self.opened.checkpoint.load(unit), self.opened.checkpoint.tensors
        path = self._path(unit)
        if path is not None and self.keep:
            return arrays
        if path is not None:
            parts = (arrays.get(f"{path}.{kind}") for kind in _PARTS)
            form = self.opened.quantizations[path]
            return {f"{path}.weight": dequantize(*parts, form, self.dtype or self.loose)}
        return {name: _cast(name, array, self._dtype_of(tensors[name])) for name, array in arrays.items()}

    # ------------------------------------------------------------------------------------------------ the whole

    def _check(self, translations: Iterable[Translation]) -> None:
        """Raise WeightsError unless the tensors are those of the model, by their outlines."""
        whole = Translation({}, {}, [])
        for one in translations:
            whole.tensors.update(one.tensors)
            whole.origins.update(one.origins)
            whole.unexpected.extend(one.unexpected)
        model = Transformer(self.opened.source.config)  # its random weights are never computed
        check(self.opened.rules, {name: array.shape for name, array in tree_flatten(model.parameters())}, whole)

    def _move(self, units: tuple[tuple[str, ...], ...]) -> Move:
        inside = self._inside(units, keep=self.keep)
        targets = to_hub(self.rules, self.change(inside)) if inside else {}
        parameters = sum(array.size for array in self._inside(units, keep=False).values())
        return Move(units, {name: (array.dtype, tuple(array.shape)) for name, array in targets.items()}, parameters)

    def _inside(self, units: tuple[tuple[str, ...], ...], *, keep: bool) -> dict[str, mx.array]:
        """Outlines of the canonical arrays of some units."""
        outline: dict[str, mx.array] = {}
        for unit in units:
            outline |= self._outline(unit, keep=keep)
        return to_canonical(self.opened.rules, outline).tensors


def _cast(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Raise CheckpointError when finite values become infinite."""
    result = array.astype(dtype)
    if dtype == mx.float16 != array.dtype and (mx.isinf(result) & mx.isfinite(array)).any().item():
        raise CheckpointError(f"{name} has values too large for float16; give bfloat16 or float32")
    return result


class _Groups:
    """Sets of things that belong together (union-find)."""

    def __init__(self) -> None:
        self.parents: dict[object, object] = {}

    def find(self, item: object) -> object:
        self.parents.setdefault(item, item)
        while self.parents[item] != item:
            self.parents[item] = item = self.parents[self.parents[item]]
        return item

    def join(self, items: Iterable[object]) -> None:
        first: object = None
        for number, item in enumerate(items):
            root = self.find(item)
            if number == 0:
                first = root
            self.parents[root] = first
