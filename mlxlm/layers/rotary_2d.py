"""Rotary positions in two dimensions: part of a head turns by one coordinate, part by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlxlm.layers.positions import AttentionPositions, Rotary, RotarySpec, TokenPositions
from mlxlm.layers.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Rotary2dSpec(Spec):
    """Two-dimensional rotary position embedding (Su 2021, "Rotary position embedding, 2"; used with the two position
    ids of Du et al. 2021, arXiv:2103.10360).

    The first `dim` features of a head turn by the token's position, the next `dim` by its place in a block
    (`TokenPositions.blocks`, 0 where there are none), the rest passes unchanged.

    dim: rotated features of each coordinate, even.  base: of the angles, default 10000.  layout: as in `RotarySpec`.
    """

    dim: int
    base: float = 10000.0
    layout: Literal["half", "interleaved"] = "half"

    def __post_init__(self) -> None:
        self._one()

    def _one(self) -> RotarySpec:
        return RotarySpec(dim=self.dim, base=self.base, layout=self.layout)

    def build(self) -> Rotary2d:
        """The module."""
        return Rotary2d(self)


class Rotary2d(AttentionPositions):
    """See `Rotary2dSpec`. Has no weights."""

    def __init__(self, spec: Rotary2dSpec):
        super().__init__()
        self.spec = spec
        self.rotary: Rotary = spec._one().build()

    def turn(self, x: mx.array, positions: TokenPositions) -> mx.array:
        """See `AttentionPositions.turn`."""
        dim = self.spec.dim
        first, second = self.rotary.turn(x[..., :dim], positions), x[..., dim:]
        # Place 0 everywhere is an angle of 0, which turns nothing.
        if positions.blocks is not None:
            second = self.rotary.turn(second, positions.of_blocks())
        return mx.concatenate([first, second], axis=-1)
