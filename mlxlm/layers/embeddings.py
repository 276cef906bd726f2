"""From token ids to vectors: token, position and token-type embeddings, scaled, normed and dropped out."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlxlm.layers.added_positions import BinaryPositionsSpec, NormalizedPositionsSpec, SinusoidalPositionsSpec
from mlxlm.layers.block_positions import BlockPositionsSpec
from mlxlm.layers.norms import NoNormSpec, NormSpec
from mlxlm.layers.positions import LearnedPositionsSpec, TokenPositions
from mlxlm.layers.spec import Spec

AddedPositionsSpec = (
    LearnedPositionsSpec | BlockPositionsSpec | SinusoidalPositionsSpec | NormalizedPositionsSpec | BinaryPositionsSpec
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingsSpec(Spec):
    """norm(scale * token + position + token type), then dropout (Vaswani et al. 2017, arXiv:1706.03762, section 3.4;
    token types: Devlin et al. 2018, arXiv:1810.04805).

    vocab_size: rows of the token table.  dim: features.  positions: added ones, default none (attention may have its
    own).  num_token_types: rows of the token-type table, default 0.  scale: of the token vectors, default 1.
    norm: after the sum, default none.  dropout: in training, default 0.
    """

    vocab_size: int
    dim: int
    positions: AddedPositionsSpec | None = None
    num_token_types: int = 0
    scale: float = 1.0
    norm: NormSpec = NoNormSpec()
    dropout: float = 0.0

    def build(self) -> Embeddings:
        """The module, ids (B, L) -> (B, L, dim)."""
        return Embeddings(self)


class Embeddings(nn.Module):
    """See `EmbeddingsSpec`. Weights: token, and position, token_type, norm where they are asked for."""

    def __init__(self, spec: EmbeddingsSpec):
        super().__init__()
        self.spec = spec
        self.token = nn.Embedding(spec.vocab_size, spec.dim)
        if spec.positions is not None:
            self.position = spec.positions.build()
        if spec.num_token_types:
            self.token_type = nn.Embedding(spec.num_token_types, spec.dim)
        self.norm = spec.norm.build()
        self.dropout = nn.Dropout(spec.dropout)

    def __call__(
        self,
        tokens: mx.array,
        positions: TokenPositions,
        token_types: mx.array | None = None,
        vectors: mx.array | None = None,
    ) -> mx.array:
        """tokens (B, L) int.  token_types (B, L) int, default 0.  vectors (B, L, dim): instead of the token table's."""
        x = self.token(tokens) if vectors is None else vectors
        if self.spec.scale != 1.0:
            # Rounded to the dtype first, as the checkpoints that scale their embeddings were trained.
            x = x * mx.array(self.spec.scale, dtype=x.dtype)
        if self.spec.positions is not None:
            x = x + self.position(positions).astype(x.dtype)
        if self.spec.num_token_types:
            types = mx.zeros((1, 1), dtype=mx.int32) if token_types is None else token_types
            x = x + self.token_type(types)
        return self.dropout(self.norm(x))
