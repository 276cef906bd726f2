"""Heads: from hidden states to logits over the vocabulary or over labels, or to one vector a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx
from mlx import nn

from mlxlm.kernels.cross_entropy import QuantizedWeight, VocabularyShard
from mlxlm.layers import NoNormSpec, NormSpec, Spec, activation
from mlxlm.layers.joined import applied


@dataclass(frozen=True, kw_only=True)
class TransformSpec(Spec):
    """norm(activation(linear(x))): what masked language models put before their output (Devlin et al. 2018).

    norm: default none.  bias: of the linear layer, default True.
    """

    dim: int
    activation: str
    norm: NormSpec = NoNormSpec()
    bias: bool = True

    def build(self) -> Transform:
        """The module, (..., dim) -> (..., dim)."""
        return Transform(self)


class Transform(nn.Module):
    """See `TransformSpec`. Weights: linear, norm."""

    def __init__(self, spec: TransformSpec):
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.dim, spec.dim, bias=spec.bias)
        self.norm = spec.norm.build()
        self._activation = activation(spec.activation)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self._activation(self.linear(x)))


@dataclass(frozen=True, kw_only=True)
class LanguageModelHeadSpec(Spec):
    """softcap(scale * (transform(x) @ W.T + b)), with W the token embedding's table when tied.

    dim: features in.  vocab_size: logits out.  tied: share the embedding's table (Press and Wolf 2016,
    arXiv:1608.05859).  bias: default False.  transform: before the projection, default none.  scale: default 1.
    softcap: bounds logits by softcap * tanh(logit / softcap), default none.
    """

    dim: int
    vocab_size: int
    tied: bool
    bias: bool = False
    transform: TransformSpec | None = None
    scale: float = 1.0
    softcap: float | None = None

    def build(self) -> LanguageModelHead:
        """The module, called with hidden states (..., dim) and the token embedding; returns (..., vocab_size)."""
        return LanguageModelHead(self)


class Projection(NamedTuple):
    """What a language model head does, as the arguments of `fused_linear_cross_entropy`, which needs no logits.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), without the tanh when softcap is None.
    hidden (..., dim): after the head's transform.  weight (V, dim), or packed.  trainable: whether weight is to learn.
    shard: when the weight has the rows of some words only, which; None for all of them.
    """

    hidden: mx.array
    weight: mx.array | QuantizedWeight
    bias: mx.array | None
    scale: float
    softcap: float | None
    trainable: bool
    shard: VocabularyShard | None = None


class LanguageModelHead(nn.Module):
    """See `LanguageModelHeadSpec`. Weights: output unless tied, bias when tied and biased, transform."""

    def __init__(self, spec: LanguageModelHeadSpec):
        super().__init__()
        self.spec = spec
        if spec.transform is not None:
            self.transform = spec.transform.build()
        if not spec.tied:
            self.output = nn.Linear(spec.dim, spec.vocab_size, bias=spec.bias)
        elif spec.bias:
            self.bias = mx.zeros((spec.vocab_size,))

    def __call__(self, hidden: mx.array, embedding: nn.Embedding) -> mx.array:
        if self.spec.transform is not None:
            hidden = self.transform(hidden)
        logits = applied(embedding if self.spec.tied else self.output, hidden)
        if self.spec.tied and self.spec.bias:
            logits = logits + self.bias
        if self.spec.scale != 1.0:
            logits = logits * self.spec.scale
        if self.spec.softcap is not None:
            logits = self.spec.softcap * mx.tanh(logits / self.spec.softcap)
        return logits

    def projection(self, hidden: mx.array, embedding: nn.Embedding) -> Projection | None:
        """The parts of `self(hidden, embedding)`, for a loss that never makes the whole logits.

        None when the layer in the place of the output or the embedding is of a kind of its own, an adapter's say,
        which no single weight describes.
        """
        layer = embedding if self.spec.tied else self.output
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            weight: mx.array | QuantizedWeight = layer.weight
        elif isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            weight = QuantizedWeight(
                layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode
            )
        else:
            return None
        if self.spec.transform is not None:
            hidden = self.transform(hidden)
        bias = self.get("bias") if self.spec.tied else layer.get("bias")
        trainable = "weight" in layer.trainable_parameters() and isinstance(weight, mx.array)
        return Projection(hidden, weight, bias, self.spec.scale, self.spec.softcap, trainable)


@dataclass(frozen=True, kw_only=True)
class PoolerSpec(Spec):
    """activation(linear(first token)): a vector for the whole sequence (Devlin et al. 2018, arXiv:1810.04805).

    next_sentence: with a two-way classifier on top, which says whether the second segment follows the first.
    """

    dim: int
    activation: str = "tanh"
    next_sentence: bool = False

    def build(self) -> Pooler:
        """The module, (B, L, dim) -> (B, dim)."""
        return Pooler(self)


class Pooler(nn.Module):
    """See `PoolerSpec`. Weights: linear and, with next_sentence, next_sentence."""

    def __init__(self, spec: PoolerSpec):
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.dim, spec.dim)
        self._activation = activation(spec.activation)
        if spec.next_sentence:
            self.next_sentence = nn.Linear(spec.dim, 2)

    def __call__(self, hidden: mx.array) -> mx.array:
        return self._activation(self.linear(hidden[:, 0]))


@dataclass(frozen=True, kw_only=True)
class TokenHeadSpec(Spec):
    """Logits over labels for each token: output(dropout(transform(x))), (..., dim) -> (..., number of labels).

    labels: their names, in order.  transform: before the projection, default none.  bias: of the projection, default
    True.  dropout: in training, default 0.
    """

    dim: int
    labels: tuple[str, ...]
    transform: TransformSpec | None = None
    bias: bool = True
    dropout: float = 0.0

    def build(self) -> ClassificationHead:
        """The module, called with hidden states (B, L, dim) and key_lengths (B,) or None."""
        return ClassificationHead(self)


@dataclass(frozen=True, kw_only=True)
class SpanHeadSpec(TokenHeadSpec):
    """Logits of each token being the first and the last of an answer, (B, L, 2) (Devlin et al. 2018, section 4.2)."""

    labels: tuple[str, ...] = ("start", "end")


@dataclass(frozen=True, kw_only=True)
class SequenceHeadSpec(TokenHeadSpec):
    """Logits over labels for the whole sequence: a `TokenHeadSpec` on one vector, (B, L, dim) -> (B, number of labels).

    pooling: that vector: the "first" token's, the "last" valid token's, or the "mean" of the valid tokens.
    dropout: before the transform and before the projection.
    """

    pooling: Literal["first", "last", "mean"]


class ClassificationHead(nn.Module):
    """See `TokenHeadSpec` and its kinds. Weights: output, and transform where it is asked for."""

    def __init__(self, spec: TokenHeadSpec):
        super().__init__()
        self.spec = spec
        if spec.transform is not None:
            self.transform = spec.transform.build()
        self.output = nn.Linear(spec.dim, len(spec.labels), bias=spec.bias)
        self.dropout = nn.Dropout(spec.dropout)

    def __call__(self, hidden: mx.array, key_lengths: mx.array | None = None) -> mx.array:
        """hidden (B, L, dim).  key_lengths (B,): valid tokens of each row, default all."""
        if isinstance(self.spec, SequenceHeadSpec):
            hidden = pool(hidden, self.spec.pooling, key_lengths)
        if self.spec.transform is not None:
            if isinstance(self.spec, SequenceHeadSpec):
                hidden = self.dropout(hidden)
            hidden = self.transform(hidden)
        return self.output(self.dropout(hidden))


def pool(hidden: mx.array, pooling: str, key_lengths: mx.array | None = None) -> mx.array:
    """One vector a row, (B, dim), from hidden states (B, L, dim): "first", "last" or "mean" of the valid tokens."""
    if pooling == "first":
        return hidden[:, 0]
    if key_lengths is None:
        return hidden[:, -1] if pooling == "last" else hidden.mean(axis=1)
    if pooling == "last":
        return mx.take_along_axis(hidden, (key_lengths - 1)[:, None, None], axis=1)[:, 0]
    valid = (mx.arange(hidden.shape[1])[None] < key_lengths[:, None])[..., None]
    return mx.where(valid, hidden, 0).sum(axis=1) / key_lengths[:, None].astype(hidden.dtype)


HeadSpec = LanguageModelHeadSpec | TokenHeadSpec
