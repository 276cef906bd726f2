"""Learned positions in two coordinates, for models that fill blanks in a text."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlxlm.layers.positions import LearnedPositionsSpec, TokenPositions
from mlxlm.layers.spec import Spec


@dataclass(frozen=True, kw_only=True)
class BlockPositionsSpec(Spec):
    """The sum of two learned vectors: one for where a token stands in the text, one for its place in a block (Du et al.
    2021, arXiv:2103.10360, section 2.2).

    Tokens of the text have place 0. Those that fill a blank all have the position of that blank, and places 1, 2, 3 ...

    num_positions: rows of either table.  dim: features.
    """

    num_positions: int
    dim: int

    @property
    def limit(self) -> int | None:
        """Usable positions."""
        return self.num_positions

    def build(self) -> BlockPositions:
        """The module, TokenPositions -> (1 or B, L, dim)."""
        return BlockPositions(self)


class BlockPositions(nn.Module):
    """See `BlockPositionsSpec`. Weights: text and block, each a table with `weight`."""

    def __init__(self, spec: BlockPositionsSpec):
        super().__init__()
        self.spec = spec
        table = LearnedPositionsSpec(num_positions=spec.num_positions, dim=spec.dim)
        self.text, self.block = table.build(), table.build()

    def __call__(self, positions: TokenPositions) -> mx.array:
        places = mx.zeros((1, 1), dtype=mx.int32) if positions.blocks is None else positions.blocks
        return self.text(positions) + self.block.weight[places]
