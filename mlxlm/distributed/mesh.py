"""The mesh: how the processes of a run share a model and its data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mlxlm.errors import UsageError, nearest

if TYPE_CHECKING:
    from mlxlm.layers import BlockSpec, ParallelBlockSpec
    from mlxlm.models import TransformerConfig

AXES = ("pp", "dp", "sp", "tp")
_NAMES = {"dp": "data", "tp": "tensor", "pp": "pipeline", "sp": "sequence"}
_ITEM = re.compile(r"\s*([A-Za-z]+)\s*=\s*(\d+)\s*")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Processes in four directions: data x tensor x pipeline x sequence parallel, each 1 by default.

    dp: replicas that see different rows.  tp: processes that share every matrix.  pp: stages of layers.  sp: parts of
    every row. Ranks count through the places with tp changing fastest, then sp, dp and pp: those that talk most are
    neighbours.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UsageError(f"{axis} is {getattr(self, axis)}; a mesh has at least 1 process in every direction")

    def __str__(self) -> str:
        return ",".join(f"{axis}={n}" for axis in ("dp", "tp", "pp", "sp") if (n := getattr(self, axis)) > 1) or "dp=1"

    @property
    def size(self) -> int:
        """Processes in all."""
        return prod(getattr(self, axis) for axis in AXES)

    def place(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank by axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found

    def rank(self, place: dict[str, int]) -> int:
        """The rank at these coordinates; axes that are left out are 0."""
        number = 0
        for axis in AXES:
            number = number * getattr(self, axis) + place.get(axis, 0)
        return number

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All ranks in groups that differ along these axes only, each in the order of the ranks."""
        for axis in axes:
            if axis not in AXES:
                raise UsageError(f"a mesh has no axis {axis!r}{nearest(axis, AXES)}")
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            place = self.place(rank)
            found.setdefault(tuple(place[axis] for axis in AXES if axis not in axes), []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    def check(self, config: TransformerConfig) -> None:
        """Raise UsageError, with the nearest size that would do, where the model can't be shared so."""
        found = tensor_problem(config, self.tp)
        if found is not None:
            fitting = [n for n in range(1, 4 * self.tp + 1) if tensor_problem(config, n) is None]
            raise UsageError(f"tp={self.tp}: {found}{_near(self.tp, fitting, 'tp')}")
        layers = sum(len(stack.layers) for stack in (config.encoder, config.decoder) if stack is not None)
        if self.pp > layers:
            raise UsageError(
                f"pp={self.pp}: the model has {layers} layers, so at most as many stages; pp={layers} would do"
            )


def tensor_problem(config: TransformerConfig, tp: int) -> str | None:
    """Why the matrices of a model can't be shared by tp processes; None when they can."""
    for layer in all_layers(config):
        crossing = getattr(layer, "cross_attention", None)
        for attention in (layer.attention, *([] if crossing is None else [crossing])):
            if attention.num_heads % tp:
                return f"{attention.num_heads} attention heads can't be shared evenly by {tp} processes"
            if attention.num_kv_heads % tp and tp % attention.num_kv_heads:
                return (
                    f"{attention.num_kv_heads} key/value heads can neither be shared by {tp} processes nor be copied "
                    "to equally many of them each"
                )
        if layer.feed_forward.hidden_dim % tp:
            return f"{layer.feed_forward.hidden_dim} feed-forward features can't be shared evenly by {tp} processes"
    return None


def all_layers(config: TransformerConfig) -> Iterator[BlockSpec | ParallelBlockSpec]:
    """The specs of all layers, the encoder's first."""
    for stack in (config.encoder, config.decoder):
        if stack is not None:
            yield from stack.layers


def _near(wanted: int, fitting: Sequence[int], axis: str) -> str:
    below = [n for n in fitting if n < wanted][-1:]
    above = [n for n in fitting if n > wanted][:1]
    choices = [f"{axis}={n}" for n in below + above]
    return f"; {' or '.join(choices)} would do" if choices else ""


def parse_mesh(text: str | None, world_size: int) -> Mesh:
    """The mesh that a text such as "dp=2,tp=2" describes, for `world_size` processes.

    None or "auto": all of them data parallel. When dp is left out, it takes the processes that are left.
    Raises UsageError, with meshes that would do, for unknown axes and for a number of processes that doesn't fit.
    """
    if text is None or text.strip() == "auto":
        return Mesh(dp=world_size)
    sizes: dict[str, int] = {}
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise UsageError(f"--mesh {text!r}: {item.strip()!r} is not AXIS=NUMBER; expected such as dp=2,tp=2")
        axis, number = match[1].lower(), int(match[2])
        if axis not in AXES:
            meanings = ", ".join(f"{name} ({meaning})" for name, meaning in _NAMES.items())
            raise UsageError(f"--mesh {text!r}: there is no axis {match[1]!r}; there are {meanings}")
        if axis in sizes:
            raise UsageError(f"--mesh {text!r}: {axis} is there twice")
        if number < 1:
            raise UsageError(f"--mesh {text!r}: {axis} is {number}; expected at least 1")
        sizes[axis] = number
    given = prod(sizes.values())
    if "dp" not in sizes and world_size % given == 0:
        sizes["dp"] = world_size // given
    mesh = Mesh(**sizes)
    if mesh.size != world_size:
        others = [Mesh(**{**sizes, axis: n}) for axis in sizes for n in range(1, world_size + 1)]
        fitting = [str(one) for one in others if one.size == world_size] or [str(Mesh(dp=world_size))]
        raise UsageError(
            f"--mesh {text} is for {mesh.size} processes, but there {'is' if world_size == 1 else 'are'} {world_size}; "
            f"--mesh {' or '.join(dict.fromkeys(fitting))} would do"
        )
    return mesh
