"""Modules that are one on disk and several inside: which belong together, and low-rank changes of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.errors import WeightsError
from mlxlm.models.weights import Rule
from mlxlm.peft.lora import LoraPart, dense_weight
from mlxlm.peft.places import at, bare, hub_path

if TYPE_CHECKING:
    from mlxlm.models import Transformer


@dataclass(frozen=True)
class Module:
    """A module on disk.  hub: its path there.  paths: canonical paths of the modules inside, one or more, in order."""

    hub: str
    rule: Rule
    paths: tuple[str, ...]

    def split(self, outputs: mx.array) -> tuple[mx.array, ...]:
        """Rows (out, ...) of the whole, to the parts."""
        # As a bias: rows of outputs, never turned around as a weight stored (in, out) is.
        return self.rule.split(outputs, "bias")

    def join(self, outputs: Sequence[mx.array]) -> mx.array:
        """Rows of the parts to those of the whole."""
        return self.rule.join(tuple(outputs), "bias")

    def transposed(self, model: Transformer) -> bool:
        """Whether the weight on disk is (in, out)."""
        rows = [bare(at(model, path)).weight.shape[0] for path in self.paths]
        columns = sum(rows) + 1  # not the number of rows, so that the shapes tell
        whole = self.rule.join(tuple(mx.zeros((count, columns)) for count in rows), "weight")
        return whole.shape[0] == columns


def module_on_disk(rules: tuple[Any, ...], hub: str) -> Module:
    """The module of a path on disk. Raises WeightsError when no rule knows it."""
    for rule in rules:
        values = rule.match_hub(f"{hub}.weight")
        if values is not None and rule.canonical:
            paths = tuple(name.removesuffix(".weight") for name in rule.canonical_names(values))
            return Module(hub, rule, paths)
    raise WeightsError(f"the adapter is for a module {hub}, which this model doesn't have")


def modules_of(rules: tuple[Any, ...], paths: Sequence[str]) -> list[Module]:
    """The modules on disk that canonical paths are parts of, each once."""
    found = {}
    for path in paths:
        hub = hub_path(rules, path)
        if hub is None:
            raise WeightsError(f"no rule says how {path} is named on disk")
        found.setdefault(hub, module_on_disk(rules, hub))
    return list(found.values())


def split_lora(
    module: Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float, magnitude: mx.array | None
) -> dict[str, LoraPart]:
    """A change of the whole, as one of each part: they share A, and B and magnitudes are divided along the outputs."""
    magnitudes = (None,) * len(module.paths) if magnitude is None else module.split(magnitude)
    parts = zip(module.paths, module.split(lora_b), magnitudes, strict=True)
    return {path: LoraPart(mx.array(lora_a), b, scale, dropout, magnitude=m) for path, b, m in parts}


@dataclass(frozen=True)
class WholeChange:
    """A low-rank change of a module on disk.  lora_a (rank, in), lora_b (out, rank), and DoRA's magnitude (out,)."""

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    magnitude: mx.array | None


def joined_lora(model: Transformer, module: Module, parts: dict[str, LoraPart]) -> WholeChange:
    """The changes of a module's parts as one of the whole.

    Parts that share A keep it; otherwise the A's are stacked and B becomes a block matrix, so that the rank is the sum
    of theirs. Parts without a change have a B of zeros.
    """
    present = [(path, parts[path]) for path in module.paths if path in parts]
    scale = present[0][1].scale
    first = present[0][1].lora_a
    shared = all(part.lora_a.shape == first.shape and mx.array_equal(part.lora_a, first) for _, part in present)
    lora_a = first if shared else mx.concatenate([part.lora_a for _, part in present])
    rows, start, magnitudes = [], 0, []
    for path in module.paths:
        base = bare(at(model, path))
        out = base.weight.shape[0]
        part = parts.get(path)
        if part is None:
            rows.append(mx.zeros((out, lora_a.shape[0])))
            magnitudes.append(None)
            continue
        block = part.lora_b * (part.scale / scale)
        if not shared:
            rank = part.lora_a.shape[0]
            block = mx.pad(block, [(0, 0), (start, lora_a.shape[0] - start - rank)])
            start += rank
        rows.append(block)
        magnitudes.append(part.get("magnitude"))
    magnitude = None
    if any(part is not None for part in magnitudes):
        lengths = [
            mx.linalg.norm(
                dense_weight(bare(at(model, path))).astype(mx.float32) + (parts[path].delta() if path in parts else 0),
                axis=1,
            )
            if own is None
            else own
            for path, own in zip(module.paths, magnitudes, strict=True)
        ]
        magnitude = module.join(lengths)
    return WholeChange(lora_a, module.join(rows), scale, magnitude)
