"""Transformer components. Each file holds the spec of a choice (a frozen dataclass) and the module it builds."""

from mlxlm.layers.activations import ACTIVATION_NAMES, activation
from mlxlm.layers.added_positions import (
    BinaryPositions,
    BinaryPositionsSpec,
    NormalizedPositions,
    NormalizedPositionsSpec,
    SinusoidalPositions,
    SinusoidalPositionsSpec,
)
from mlxlm.layers.additive_attention import AdditiveAttention, AdditiveAttentionSpec
from mlxlm.layers.alibi import Alibi, AlibiSpec, alibi_slopes
from mlxlm.layers.attention import Attention, AttentionSpec, Scope
from mlxlm.layers.block import (
    Block,
    BlockSpec,
    ParallelBlock,
    ParallelBlockSpec,
    Residual,
    ResidualSpec,
    deepnorm_scales,
)
from mlxlm.layers.block_positions import BlockPositions, BlockPositionsSpec
from mlxlm.layers.cache import Cache, KeyValueCache
from mlxlm.layers.cache_storage import FloatStorage, QuantizedStorage
from mlxlm.layers.cache_window import CacheSpec, WindowCache
from mlxlm.layers.embeddings import Embeddings, EmbeddingsSpec
from mlxlm.layers.feed_forward import FeedForward, FeedForwardSpec
from mlxlm.layers.norms import LayerNormSpec, NoNormSpec, NormSpec, OffsetRMSNorm, RMSNormSpec
from mlxlm.layers.positions import (
    AttentionPositions,
    LearnedPositions,
    LearnedPositionsSpec,
    NoPositionsSpec,
    Rotary,
    RotarySpec,
    TokenPositions,
)
from mlxlm.layers.relative_positions import RelativeBuckets, RelativeBucketsSpec, relative_buckets
from mlxlm.layers.rotary_2d import Rotary2d, Rotary2dSpec
from mlxlm.layers.rotary_scaling import (
    DynamicScalingSpec,
    LinearScalingSpec,
    LongScalingSpec,
    NoScalingSpec,
    ProportionalScalingSpec,
    WavelengthScalingSpec,
    YarnScalingSpec,
)
from mlxlm.layers.spec import Spec, differences
from mlxlm.layers.virtual import Prefix, VirtualTokens, shifted

__all__ = [
    "ACTIVATION_NAMES",
    "AdditiveAttention",
    "AdditiveAttentionSpec",
    "Alibi",
    "AlibiSpec",
    "Attention",
    "AttentionPositions",
    "AttentionSpec",
    "BinaryPositions",
    "BinaryPositionsSpec",
    "Block",
    "BlockPositions",
    "BlockPositionsSpec",
    "BlockSpec",
    "Cache",
    "CacheSpec",
    "DynamicScalingSpec",
    "Embeddings",
    "EmbeddingsSpec",
    "FeedForward",
    "FeedForwardSpec",
    "FloatStorage",
    "KeyValueCache",
    "LayerNormSpec",
    "LearnedPositions",
    "LearnedPositionsSpec",
    "LinearScalingSpec",
    "LongScalingSpec",
    "NoNormSpec",
    "NoPositionsSpec",
    "NoScalingSpec",
    "NormSpec",
    "NormalizedPositions",
    "NormalizedPositionsSpec",
    "OffsetRMSNorm",
    "ParallelBlock",
    "ParallelBlockSpec",
    "Prefix",
    "ProportionalScalingSpec",
    "QuantizedStorage",
    "RMSNormSpec",
    "RelativeBuckets",
    "RelativeBucketsSpec",
    "Residual",
    "ResidualSpec",
    "Rotary",
    "Rotary2d",
    "Rotary2dSpec",
    "RotarySpec",
    "Scope",
    "SinusoidalPositions",
    "SinusoidalPositionsSpec",
    "Spec",
    "TokenPositions",
    "VirtualTokens",
    "WavelengthScalingSpec",
    "WindowCache",
    "YarnScalingSpec",
    "activation",
    "alibi_slopes",
    "deepnorm_scales",
    "differences",
    "relative_buckets",
    "shifted",
]
