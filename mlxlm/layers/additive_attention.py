"""Additive attention: the score is a small network of query and key, not their product."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlxlm.errors import AttentionError
from mlxlm.layers.spec import Spec


@dataclass(frozen=True, kw_only=True)
class AdditiveAttentionSpec(Spec):
    """score(q, k) = v . tanh(W q + U k) (Bahdanau, Cho and Bengio 2014, arXiv:1409.0473), and the softmax-weighted
    mean of the values.

    query_dim, memory_dim: features of queries, and of the memory that gives keys and values.
    hidden_dim: width of the network.
    """

    query_dim: int
    memory_dim: int
    hidden_dim: int

    def build(self) -> AdditiveAttention:
        """The module, queries (B, L, query_dim) and memory (B, S, memory_dim) -> (B, L, memory_dim)."""
        return AdditiveAttention(self)


class AdditiveAttention(nn.Module):
    """See `AdditiveAttentionSpec`. Weights: query, key, score.

    It goes back before products of queries and keys, so it has nothing that the attention kernels could take over: it
    needs O(L * S * hidden_dim) memory and is here to study and for short memories.
    """

    def __init__(self, spec: AdditiveAttentionSpec):
        super().__init__()
        self.spec = spec
        self.query = nn.Linear(spec.query_dim, spec.hidden_dim, bias=False)
        self.key = nn.Linear(spec.memory_dim, spec.hidden_dim, bias=False)
        self.score = nn.Linear(spec.hidden_dim, 1, bias=False)

    def __call__(self, query: mx.array, memory: mx.array, memory_lengths: mx.array | None = None) -> mx.array:
        """memory_lengths (B,): valid positions of each memory, at least 1; the rest is padding, default none.

        Raises AttentionError for shapes that don't fit together.
        """
        return self.weights(query, memory, memory_lengths) @ memory

    def weights(self, query: mx.array, memory: mx.array, memory_lengths: mx.array | None = None) -> mx.array:
        """The attention weights (B, L, S): the soft alignment of the paper."""
        if query.ndim != 3 or memory.ndim != 3 or query.shape[0] != memory.shape[0]:
            raise AttentionError(
                f"queries {query.shape} and memory {memory.shape} don't fit together; expected "
                f"(B, L, {self.spec.query_dim}) and (B, S, {self.spec.memory_dim})"
            )
        # (B, L, 1, hidden) + (B, 1, S, hidden)
        hidden = mx.tanh(self.query(query)[:, :, None] + self.key(memory)[:, None])
        scores = self.score(hidden)[..., 0].astype(mx.float32)
        if memory_lengths is not None:
            visible = mx.arange(memory.shape[1]) < memory_lengths[:, None, None]
            scores = mx.where(visible, scores, -mx.inf)
        return mx.softmax(scores, axis=-1).astype(memory.dtype)
