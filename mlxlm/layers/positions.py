"""Where tokens stand, and the position encodings.

Two kinds meet here: encodings added to the embeddings (`LearnedPositionsSpec`; more in added_positions.py), and
encodings that act inside attention through two hooks, `rotate` on queries and keys and `score_terms` on scores
(`RotarySpec`, `NoPositionsSpec`; more in alibi.py, rotary_2d.py and relative_positions.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx import nn

from mlxlm.errors import ConfigError
from mlxlm.layers.rotary_scaling import NoScalingSpec
from mlxlm.layers.spec import Spec


class TokenPositions:
    """Positions of the L tokens of one forward pass: contiguous from an offset, or given one by one.

    offset: position of the first token, int, scalar array or (B,) array.  explicit: (B, L) int array that replaces it.
    blocks: (B, L) int array, a second coordinate for encodings that have two; None stands for 0 everywhere.
    context: tokens that the whole context will have, when these are a part of it; some encodings depend on it.
    """

    def __init__(
        self,
        num_tokens: int,
        offset: int | mx.array = 0,
        explicit: mx.array | None = None,
        blocks: mx.array | None = None,
        context: int = 0,
    ):
        self.num_tokens = num_tokens
        self.offset = offset
        self.explicit = explicit
        self.blocks = blocks
        self.context = context
        # What position encodings made of these positions, by their spec: it is the same in every layer.
        self.made: dict[Spec, Any] = {}
        self._of_blocks: TokenPositions | None = None

    @property
    def length(self) -> int | mx.array:
        """Tokens of the context: highest position + 1, or more if `context` says so. An int when that is known."""
        if self.explicit is not None:
            return mx.maximum(mx.max(self.explicit) + 1, self.context)
        if isinstance(self.offset, int):
            return max(self.offset + self.num_tokens, self.context)
        return mx.maximum(mx.max(self.offset) + self.num_tokens, self.context)

    def of_blocks(self) -> TokenPositions:
        """The second coordinates as positions; the same object each time."""
        if self._of_blocks is None:
            self._of_blocks = TokenPositions(self.num_tokens, explicit=self.blocks)
        return self._of_blocks

    def array(self) -> mx.array:
        """(1 or B, L) int32."""
        if self.explicit is not None:
            return self.explicit
        steps = mx.arange(self.num_tokens, dtype=mx.int32)[None]
        return steps + (self.offset if isinstance(self.offset, int) else self.offset.reshape(-1, 1))


@dataclass(frozen=True, kw_only=True)
class LearnedPositionsSpec(Spec):
    """One learned vector a position, added to the token embedding (Gehring et al. 2017, arXiv:1705.03122).

    num_positions: usable positions.  dim: features.  first: row of position 0, default 0; the table has
    num_positions + first rows.
    """

    num_positions: int
    dim: int
    first: int = 0

    @property
    def limit(self) -> int | None:
        """Usable positions."""
        return self.num_positions

    def build(self) -> LearnedPositions:
        """The module, TokenPositions -> (1 or B, L, dim)."""
        return LearnedPositions(self)


class LearnedPositions(nn.Module):
    """See `LearnedPositionsSpec`."""

    def __init__(self, spec: LearnedPositionsSpec):
        super().__init__()
        self.spec = spec
        self.weight = mx.random.normal((spec.num_positions + spec.first, spec.dim), scale=0.02)

    def __call__(self, positions: TokenPositions) -> mx.array:
        if positions.explicit is None and isinstance(positions.offset, int):
            start = positions.offset + self.spec.first
            return self.weight[start : start + positions.num_tokens][None]
        return self.weight[positions.array() + self.spec.first]


class AttentionPositions(nn.Module):
    """The two hooks through which a position encoding acts inside attention; both do nothing here."""

    def rotate(self, query: mx.array, key: mx.array, positions: TokenPositions) -> tuple[mx.array, mx.array]:
        """Query (B, H, L, D) and key (B, Hkv, L, D), turned by their positions."""
        return self.turn(query, positions), self.turn(key, positions)

    def turn(self, x: mx.array, positions: TokenPositions) -> mx.array:
        """Heads x (B, any number, L, D), turned by their positions."""
        return x

    def score_terms(self, query_length: int, key_length: int, offset: int | mx.array) -> dict[str, Any]:
        """Keywords for `mlxlm.kernels.attention` that add to the scores."""
        return {}


@dataclass(frozen=True, kw_only=True)
class NoPositionsSpec(Spec):
    """Attention that knows no positions (they are added to the embeddings, or absent)."""

    def build(self) -> AttentionPositions:
        """A module whose hooks do nothing."""
        return AttentionPositions()


@dataclass(frozen=True, kw_only=True)
class RotarySpec(Spec):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    dim: rotated features of each head, even; the rest passes unchanged.  base: of the angles, default 10000.
    layout: "half" pairs feature i with i + dim/2, "interleaved" pairs 2i with 2i+1.
    scaling: for longer contexts, see `rotary_scaling`.
    """

    dim: int
    base: float = 10000.0
    layout: Literal["half", "interleaved"] = "half"
    scaling: NoScalingSpec = NoScalingSpec()

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise ConfigError(f"rotary positions turn pairs of features: the width must be even, not {self.dim}")
        if self.layout not in ("half", "interleaved"):
            raise ConfigError(f"rotary layout is 'half' or 'interleaved', not {self.layout!r}")

    def build(self) -> Rotary:
        """The module."""
        return Rotary(self)


class Rotary(AttentionPositions):
    """See `RotarySpec`. Has no weights."""

    def __init__(self, spec: RotarySpec):
        super().__init__()
        self.spec = spec
        # Computed once unless the context length matters. Underscored attributes are no parameters to mlx.nn.
        fixed = not spec.scaling.depends_on_length
        self._inverse = spec.scaling.inverse_frequencies(spec.dim, spec.base) if fixed else None
        self._wavelengths = None if self._inverse is None else 1.0 / self._inverse
        self._factor = spec.scaling.attention_factor

    def turn(self, x: mx.array, positions: TokenPositions) -> mx.array:
        """See `AttentionPositions.turn`."""
        if positions.explicit is None and self._wavelengths is not None:
            return self._turn_fast(x, self._wavelengths, positions.offset)
        # All heads of all layers share what follows from the positions.
        made = positions.made
        if self.spec not in made:
            made[self.spec] = self._angles(positions)
        if positions.explicit is None:
            return self._turn_fast(x, made[self.spec], positions.offset)
        return self._turn(x, *made[self.spec])

    def _angles(self, positions: TokenPositions) -> Any:
        """The wavelengths, or cosines and sines (B, 1, L, dim / 2) where the positions are given one by one."""
        inverse = self._inverse
        if inverse is None:
            inverse = self.spec.scaling.inverse_frequencies(self.spec.dim, self.spec.base, positions.length)
        if positions.explicit is None:
            return 1.0 / inverse
        angles = positions.explicit[:, None, :, None].astype(mx.float32) * inverse
        return mx.cos(angles) * self._factor, mx.sin(angles) * self._factor

    def _turn_fast(self, x: mx.array, wavelengths: mx.array, offset: int | mx.array) -> mx.array:
        dim = self.spec.dim
        turned = mx.fast.rope(
            x,
            dim,
            traditional=self.spec.layout == "interleaved",
            base=None,
            scale=1.0,
            offset=offset,
            freqs=wavelengths,
        )
        if self._factor == 1.0:
            return turned
        if dim == x.shape[-1]:
            return turned * self._factor
        return mx.concatenate([turned[..., :dim] * self._factor, turned[..., dim:]], axis=-1)

    def _turn(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        dim, dtype = self.spec.dim, x.dtype
        rotated = x[..., :dim].astype(mx.float32)
        if self.spec.layout == "interleaved":
            first, second = rotated[..., 0::2], rotated[..., 1::2]
            turned = mx.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(rotated.shape)
        else:
            first, second = rotated[..., : dim // 2], rotated[..., dim // 2 :]
            turned = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        turned = turned.astype(dtype)
        return turned if dim == x.shape[-1] else mx.concatenate([turned, x[..., dim:]], axis=-1)
