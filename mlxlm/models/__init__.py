"""The one Transformer stack, the families that configure it, and checkpoints in and out."""

from mlxlm.models.classifier import with_classification_head
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.models.families import families, family, family_of, model_types
from mlxlm.models.family import Family
from mlxlm.models.gguf_contents import GgufContents, gguf_contents
from mlxlm.models.heads import (
    LanguageModelHeadSpec,
    PoolerSpec,
    SequenceHeadSpec,
    SpanHeadSpec,
    TokenHeadSpec,
    TransformSpec,
    pool,
)
from mlxlm.models.loading import OpenedModel, find, load, load_model, open_model
from mlxlm.models.saving import save
from mlxlm.models.source import Source
from mlxlm.models.transformer import Transformer

__all__ = [
    "Family",
    "GgufContents",
    "LanguageModelHeadSpec",
    "OpenedModel",
    "PoolerSpec",
    "SequenceHeadSpec",
    "Source",
    "SpanHeadSpec",
    "StackSpec",
    "TokenHeadSpec",
    "TransformSpec",
    "Transformer",
    "TransformerConfig",
    "families",
    "family",
    "family_of",
    "find",
    "gguf_contents",
    "load",
    "load_model",
    "model_types",
    "open_model",
    "pool",
    "save",
    "with_classification_head",
]
