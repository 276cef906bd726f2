"""Relative positions in buckets: a learned number for each head and each range of distances, added to the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlm.errors import ConfigError
from mlxlm.layers.positions import AttentionPositions
from mlxlm.layers.spec import Spec


def relative_buckets(max_distance: int, num_buckets: int, bidirectional: bool) -> np.ndarray:
    """The bucket of each relative position (key minus query) from -max_distance to max_distance, int32.

    Half of the buckets of a direction hold one distance each, the other half ranges that grow as the logarithm of the
    distance; everything from max_distance on shares the last one. Without `bidirectional` a key after the query
    counts as one at the query (Raffel et al. 2019, arXiv:1910.10683, section 2.1).
    """
    relative = np.arange(-max_distance, max_distance + 1)
    buckets = num_buckets // 2 if bidirectional else num_buckets
    first = np.where(relative > 0, buckets, 0) if bidirectional else 0
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    exact = buckets // 2
    # In float32 and in this order, because the borders of the buckets depend on the rounding.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    growing = ratio / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + growing.astype(np.int32), buckets - 1)
    return (first + np.where(distance < exact, distance, far)).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class RelativeBucketsSpec(Spec):
    """Bucketed relative position bias (Raffel et al. 2019, arXiv:1910.10683).

    num_heads: query heads.  bidirectional: whether keys after the query have buckets of their own; True in an
    encoder, False in a decoder.  num_buckets: of both directions together, default 32.  max_distance: where the last
    bucket begins, default 128.
    """

    num_heads: int
    bidirectional: bool
    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        exact = self.num_buckets // (4 if self.bidirectional else 2)
        if exact < 1 or self.max_distance <= exact:
            raise ConfigError(
                f"{self.num_buckets} relative buckets up to distance {self.max_distance} leave no room for ranges: "
                f"the distance must be more than {max(exact, 1)} and there must be at least 4 buckets"
            )

    def build(self) -> RelativeBuckets:
        """The module."""
        return RelativeBuckets(self)


class RelativeBuckets(AttentionPositions):
    """See `RelativeBucketsSpec`. Weights: weight (num_buckets, num_heads)."""

    def __init__(self, spec: RelativeBucketsSpec):
        super().__init__()
        self.spec = spec
        self.weight = mx.random.normal((spec.num_buckets, spec.num_heads), scale=0.02)
        # Underscored attributes are no parameters to mlx.nn.
        self._buckets = mx.array(relative_buckets(spec.max_distance, spec.num_buckets, spec.bidirectional))

    def score_terms(self, query_length: int, key_length: int, offset: int | mx.array) -> dict[str, Any]:
        """See `AttentionPositions.score_terms`: `relative_bias`, or `bias` when each row has an offset of its own."""
        if isinstance(offset, int) or offset.size == 1:
            start = offset if isinstance(offset, int) else offset.reshape(())
            relative = mx.arange(1 - query_length, key_length) - start
            return {"relative_bias": self._bias(relative).T}
        query = offset.reshape(-1, 1) + mx.arange(query_length)
        relative = mx.arange(key_length) - query[..., None]
        return {"bias": self._bias(relative).transpose(0, 3, 1, 2)}

    def _bias(self, relative: mx.array) -> mx.array:
        """(..., num_heads) for relative positions (...)."""
        far = self.spec.max_distance
        return self.weight[self._buckets[mx.clip(relative, -far, far) + far]]
