"""Transformer blocks: residual connections with a norm in any place, around attention and feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlxlm.layers.attention import AttentionSpec, Scope
from mlxlm.layers.cache import KeyValueCache
from mlxlm.layers.feed_forward import FeedForwardSpec
from mlxlm.layers.norms import NoNormSpec, NormSpec
from mlxlm.layers.spec import Spec


@dataclass(frozen=True, kw_only=True)
class ResidualSpec(Spec):
    """y = norm_after(alpha * x' + dropout(norm_out(f(norm_in(x))))), x' = norm_in(x) if from_normed else x.

    pre-norm: norm_in.  post-norm: norm_after.  sandwich: norm_in and norm_out (Ding et al. 2021, arXiv:2105.13290).
    DeepNorm: norm_after and alpha (Wang et al. 2022, arXiv:2203.00555).
    alpha: weight of the input, default 1.  from_normed: default False.  dropout: in training, default 0.
    """

    norm_in: NormSpec = NoNormSpec()
    norm_out: NormSpec = NoNormSpec()
    norm_after: NormSpec = NoNormSpec()
    alpha: float = 1.0
    from_normed: bool = False
    dropout: float = 0.0

    def build(self) -> Residual:
        """The module, called with x and the function around which it goes."""
        return Residual(self)


class Residual(nn.Module):
    """See `ResidualSpec`."""

    def __init__(self, spec: ResidualSpec):
        super().__init__()
        self.spec = spec
        self.norm_in = spec.norm_in.build()
        self.norm_out = spec.norm_out.build()
        self.norm_after = spec.norm_after.build()
        self.dropout = nn.Dropout(spec.dropout)

        # What is added to the sum, a function of it as the norm after it makes it; none unless someone sets one.
        self.after: nn.Module | None = None

    def __call__(self, x: mx.array, function: Callable[[mx.array], mx.array]) -> mx.array:
        normed = self.norm_in(x)
        kept = normed if self.spec.from_normed else x
        if self.spec.alpha != 1.0:
            kept = self.spec.alpha * kept
        total = kept + self.dropout(self.norm_out(function(normed)))
        if self.after is not None:
            total = total + self.after(self.norm_after(total))
        return self.norm_after(total)


def deepnorm_scales(encoder_layers: int, decoder_layers: int) -> dict[str, tuple[float, float]]:
    """DeepNorm's (alpha, beta) by stack, "encoder" and "decoder" (Wang et al. 2022, arXiv:2203.00555, figure 2).

    alpha goes into `ResidualSpec`, beta scales the initial weights of feed-forward, value and output projections.
    encoder_layers, decoder_layers: their numbers, 0 for a model without that stack.
    """
    n, m = encoder_layers, decoder_layers
    if not m:
        return {"encoder": ((2 * n) ** 0.25, (8 * n) ** -0.25)}
    if not n:
        return {"decoder": ((2 * m) ** 0.25, (8 * m) ** -0.25)}
    return {
        "encoder": (0.81 * (n**4 * m) ** 0.0625, 0.87 * (n**4 * m) ** -0.0625),
        "decoder": ((3 * m) ** 0.25, (12 * m) ** -0.25),
    }


@dataclass(frozen=True, kw_only=True)
class BlockSpec(Spec):
    """One layer of a Transformer (Vaswani et al. 2017, arXiv:1706.03762): attention, cross-attention in a decoder with
    memory, feed-forward, one by one.

    Each part has a residual connection of its own, which says where the norms are.
    """

    attention: AttentionSpec
    attention_residual: ResidualSpec
    feed_forward: FeedForwardSpec
    feed_forward_residual: ResidualSpec
    cross_attention: AttentionSpec | None = None
    cross_attention_residual: ResidualSpec | None = None

    def build(self) -> Block:
        """The module, (B, L, dim) -> (B, L, dim)."""
        return Block(self)


class Block(nn.Module):
    """See `BlockSpec`."""

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.spec = spec
        self.attention = spec.attention.build()
        self.attention_residual = spec.attention_residual.build()
        if spec.cross_attention is not None:
            self.cross_attention = spec.cross_attention.build()
            self.cross_attention_residual = (spec.cross_attention_residual or ResidualSpec()).build()
        self.feed_forward = spec.feed_forward.build()
        self.feed_forward_residual = spec.feed_forward_residual.build()

    def __call__(
        self, x: mx.array, scope: Scope, cache: KeyValueCache | None = None, memory: mx.array | None = None
    ) -> mx.array:
        x = self.attention_residual(x, lambda h: self.attention(h, scope, cache))
        if self.spec.cross_attention is not None and memory is not None:
            x = self.cross_attention_residual(x, lambda h: self.cross_attention(h, scope, cache, memory))
        return self.feed_forward_residual(x, self.feed_forward)

    def project(self, x: mx.array, scope: Scope) -> tuple[mx.array, mx.array, mx.array]:
        """What self-attention asks and offers: queries, keys and values of x (B, L, dim), see `Attention.project`."""
        return self.attention.project(self.attention_residual.norm_in(x), scope)

    def finish(self, x: mx.array, found: mx.array) -> mx.array:
        """The block's output (B, L, dim), given what self-attention found, (B, H, L, D); without cross-attention."""
        x = self.attention_residual(x, lambda _: self.attention.project_out(found))
        return self.feed_forward_residual(x, self.feed_forward)


@dataclass(frozen=True, kw_only=True)
class ParallelBlockSpec(Spec):
    """x + attention(norm(x)) + feed_forward(feed_forward_norm(x)) (Wang and Komatsuzaki 2021, GPT-J).

    feed_forward_norm: None shares `norm` between both.  dropout: of both branches in training, default 0.
    """

    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    norm: NormSpec
    feed_forward_norm: NormSpec | None = None
    dropout: float = 0.0

    def build(self) -> ParallelBlock:
        """The module, (B, L, dim) -> (B, L, dim)."""
        return ParallelBlock(self)


class ParallelBlock(nn.Module):
    """See `ParallelBlockSpec`."""

    def __init__(self, spec: ParallelBlockSpec):
        super().__init__()
        self.spec = spec
        self.attention = spec.attention.build()
        self.feed_forward = spec.feed_forward.build()
        self.norm = spec.norm.build()
        if spec.feed_forward_norm is not None:
            self.feed_forward_norm = spec.feed_forward_norm.build()
        self.dropout = nn.Dropout(spec.dropout)
        # What is added to the output, a function of it; none unless someone sets one.
        self.after: nn.Module | None = None

    def __call__(
        self, x: mx.array, scope: Scope, cache: KeyValueCache | None = None, memory: mx.array | None = None
    ) -> mx.array:
        normed = self.norm(x)
        other = normed if self.spec.feed_forward_norm is None else self.feed_forward_norm(x)
        total = x + self.dropout(self.attention(normed, scope, cache)) + self.dropout(self.feed_forward(other))
        return total if self.after is None else total + self.after(total)

    def project(self, x: mx.array, scope: Scope) -> tuple[mx.array, mx.array, mx.array]:
        """See `Block.project`."""
        return self.attention.project(self.norm(x), scope)

    def finish(self, x: mx.array, found: mx.array) -> mx.array:
        """See `Block.finish`."""
        other = (self.norm if self.spec.feed_forward_norm is None else self.feed_forward_norm)(x)
        total = x + self.dropout(self.attention.project_out(found)) + self.dropout(self.feed_forward(other))
        return total if self.after is None else total + self.after(total)
