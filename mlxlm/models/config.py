"""The configuration of a whole model: a tree of layer specs."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxlm.errors import ConfigError
from mlxlm.layers import (
    BlockPositionsSpec,
    BlockSpec,
    EmbeddingsSpec,
    NoNormSpec,
    NormSpec,
    ParallelBlockSpec,
    RelativeBucketsSpec,
    Rotary2dSpec,
    Spec,
)
from mlxlm.models.heads import HeadSpec, LanguageModelHeadSpec, PoolerSpec


@dataclass(frozen=True, kw_only=True)
class StackSpec(Spec):
    """Blocks one after another, then a norm.

    layers: one spec a block.  norm: after the last block, default none.  positions: an encoding that the
    self-attention of all layers shares, default none.  dropout: of what goes in and of what the norm gives out, in
    training, default 0.
    """

    layers: tuple[BlockSpec | ParallelBlockSpec, ...] = field(repr=False)
    norm: NormSpec = NoNormSpec()
    positions: RelativeBucketsSpec | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("a stack needs at least one layer")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Spec):
    """What `Transformer` builds: encoder-only, decoder-only or both.

    embeddings: of the tokens, shared by encoder and decoder.  encoder, decoder: stacks, at least one.
    head: turns hidden states into logits, None for a bare model.  pooler: a vector a sequence, default none.
    max_length: tokens the model was made for, None where there is no limit.  decoder_start: the token with which a
    decoder behind an encoder begins, None elsewhere.
    """

    embeddings: EmbeddingsSpec
    encoder: StackSpec | None = None
    decoder: StackSpec | None = None
    head: HeadSpec | None = None
    pooler: PoolerSpec | None = None
    max_length: int | None = None
    decoder_start: int | None = None

    def __post_init__(self) -> None:
        if self.encoder is None and self.decoder is None:
            raise ConfigError("a model needs an encoder, a decoder or both")
        if (self.decoder_start is not None) != self.has_memory:
            raise ConfigError("decoder_start belongs to models with an encoder and a decoder, and only to them")

    @property
    def dim(self) -> int:
        """Features of a hidden state."""
        return self.embeddings.dim

    @property
    def stack(self) -> StackSpec:
        """The stack whose output the head reads: the decoder where there is one."""
        return self.decoder or self.encoder  # type: ignore[return-value]

    @property
    def has_memory(self) -> bool:
        """Whether a decoder reads what an encoder made of other tokens."""
        return self.encoder is not None and self.decoder is not None

    @property
    def predicts_words(self) -> bool:
        """Whether the head gives logits over the vocabulary."""
        return isinstance(self.head, LanguageModelHeadSpec)

    @property
    def fills_blanks(self) -> bool:
        """Whether tokens have a second coordinate, their place in a blank that they fill."""
        rotary = isinstance(self.stack.layers[0].attention.positions, Rotary2dSpec)
        return rotary or isinstance(self.embeddings.positions, BlockPositionsSpec)

    @property
    def untied(self) -> bool:
        """Whether the head gives logits over the vocabulary by a table of its own."""
        return isinstance(self.head, LanguageModelHeadSpec) and not self.head.tied
