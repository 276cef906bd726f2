"""The memory of generation: what caches take, how long a prefill chunk may be, how many rows fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxlm import runtime
from mlxlm.errors import UsageError
from mlxlm.layers import CacheSpec

if TYPE_CHECKING:
    from mlxlm.models import Transformer, TransformerConfig

# Share of the free memory that caches may take; the rest is for activations, logits and what else runs.
_CACHE_SHARE = 0.7
_CHUNK_SHARE = 0.05
LONGEST_CHUNK, SHORTEST_CHUNK = 2048, 64
# Larger matrix products gain nothing on a few cores, and the first token should not wait for a whole long chunk.
_LONGEST_CPU_CHUNK = 512


def cache_bytes(config: TransformerConfig, length: int, *, spec: CacheSpec, size: int) -> int:
    """Bytes that one row of a cache takes for a text of `length` tokens, free room included.

    size: bytes of a value that is not quantized.
    """
    total = 0
    for layer in config.decoder.layers if config.decoder is not None else ():
        own = layer.attention
        slots = spec.held(own.window, length)
        values = 2 * own.num_kv_heads * own.head_dim
        if spec.bits is None:
            total += slots * values * size
        else:
            groups = 2 * own.num_kv_heads * -(-own.head_dim // spec.group_size)
            total += slots * groups * (spec.group_size * spec.bits // 8 + 2 * size)
    return total


def activation_bytes(config: TransformerConfig, *, size: int) -> int:
    """Bytes that the widest layer works with for one token of a prompt: its inputs, projections and hidden features."""
    widest = 0
    for layer in config.decoder.layers if config.decoder is not None else ():
        own, inner = layer.attention, layer.feed_forward
        attention = own.head_dim * (3 * own.num_heads + 4 * own.num_kv_heads)
        hidden = inner.hidden_dim * (3 if inner.gated else 2)
        widest = max(widest, 4 * config.dim + max(attention, hidden))
    return widest * size


def free_bytes() -> int | None:
    """Memory that is left for generation, None where the device does not say how much it has."""
    figures = runtime.memory()
    limit = figures.working_set or figures.total
    return None if limit is None else max(limit - figures.active, 0)


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """How generation uses the memory.

    chunk: tokens of a prompt that are read at once.  cache_limit: bytes that the caches of all rows may take, None for
    no limit.  row_bytes: of one row of `length` tokens.
    """

    chunk: int
    cache_limit: int | None
    row_bytes: int
    length: int

    @property
    def rows(self) -> int | None:
        """Rows of that length that fit, None for any number."""
        return None if self.cache_limit is None else self.cache_limit // max(self.row_bytes, 1)


def plan_generation(
    model: Transformer, *, length: int = 4096, spec: CacheSpec | None = None, cache_limit: int | None = None
) -> GenerationPlan:
    """The plan for a loaded model.

    length: of the longest row, prompt and answer.  cache_limit: bytes, default a share of the memory that is free now.
    """
    if length < 1 or (cache_limit is not None and cache_limit < 1):
        raise UsageError("length and cache_limit of a generation plan are at least 1")
    spec = CacheSpec() if spec is None else spec
    free = free_bytes()
    if cache_limit is None and free is not None:
        cache_limit = int(free * _CACHE_SHARE)
    return GenerationPlan(
        chunk=prefill_chunk(model),
        cache_limit=cache_limit,
        row_bytes=cache_bytes(model.config, length, spec=spec, size=value_bytes(model)),
        length=length,
    )


def prefill_chunk(model: Transformer) -> int:
    """Tokens of a prompt to read at once: a power of two whose activations take a small share of the free memory."""
    longest = _LONGEST_CPU_CHUNK if runtime.backend() == "cpu" else LONGEST_CHUNK
    free = free_bytes()
    if free is None:
        return longest
    tokens = int(free * _CHUNK_SHARE) // activation_bytes(model.config, size=value_bytes(model))
    return min(longest, max(SHORTEST_CHUNK, 1 << max(tokens, 1).bit_length() - 1))


def value_bytes(model: Transformer) -> int:
    """Bytes of a value of keys, values and activations."""
    dtype = next(
        (array.dtype for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)),
        mx.float32,
    )
    return dtype.size
