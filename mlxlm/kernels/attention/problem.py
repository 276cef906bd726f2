"""The static description of a call, all that planner and kernels are chosen by; no array is evaluated for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxlm.kernels.attention.mask import AttentionMask

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """The static description of one call: all that may steer the choice of a kernel, nothing that needs evaluation.

    dtype: "float32", "float16" or "bfloat16".  kv_heads divides heads.  query_offset: None where it is an array.
    segments, prefix, lengths: whether the mask has them.  masked: whether it may hide anything at all, so that kernels
    read the range of keys of each query.  alibi, relative_bias, bias, sinks: whether they are given.
    bias_broadcast: along which of batch, heads, queries and keys the bias is one number for all.
    """

    dtype: str
    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    causal: bool = False
    window: int | None = None
    query_offset: int | None = 0
    prefix: bool = False
    lengths: bool = False
    segments: bool = False
    masked: bool = False
    alibi: bool = False
    relative_bias: bool = False
    bias: bool = False
    bias_broadcast: tuple[bool, bool, bool, bool] = (False, False, False, False)
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    return_lse: bool = False

    @property
    def element_bytes(self) -> int:
        return _ELEMENT_BYTES[self.dtype]

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.heads // self.kv_heads

    @property
    def score_bytes(self) -> int:
        """Bytes of all scores in float32, which a dense implementation holds at least once."""
        return 4 * self.batch * self.heads * self.query_length * self.key_length

    @property
    def mean_keys(self) -> float:
        """Mean number of keys that causality and window leave to a query."""
        keys = self.key_length
        if self.prefix or self.query_offset is None:
            return keys
        mean = keys
        if self.causal:
            mean = max(1.0, min(keys, max(self.query_offset, 0) + (self.query_length + 1) / 2))
        if self.window is not None:
            mean = min(mean, self.window if self.causal else 2 * self.window - 1)
        return mean

    def widest_range(self, rows: int) -> int:
        """Most keys that a block of `rows` queries can see."""
        if self.window is None or self.prefix or self.query_offset is None:
            return self.key_length
        return min(self.key_length, (self.window - 1) * (1 if self.causal else 2) + rows)


def describe(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: AttentionMask,
    *,
    alibi_slopes: mx.array | None = None,
    relative_bias: mx.array | None = None,
    bias: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    dropout: float = 0.0,
    dropout_key: mx.array | None = None,
    return_lse: bool = False,
) -> AttentionProblem:
    """The problem that these arguments of `attention` pose; looks at shapes and kinds only, evaluates nothing."""
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = value.shape[1:]
    offset = mask.offset(query_length, key_length)
    return AttentionProblem(
        dtype=str(query.dtype).removeprefix("mlx.core."),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        value_dim=value_dim,
        causal=mask.causal,
        window=mask.window,
        query_offset=offset if isinstance(offset, int) else None,
        prefix=mask.prefix_lengths is not None,
        lengths=mask.key_lengths is not None,
        segments=mask.query_segments is not None,
        masked=not mask.is_plain(query_length, key_length),
        alibi=alibi_slopes is not None,
        relative_bias=relative_bias is not None,
        bias=bias is not None,
        bias_broadcast=_broadcast(bias, (batch, heads, query_length, key_length)),
        softcap=softcap is not None,
        sinks=sinks is not None,
        dropout=dropout > 0.0,
        return_lse=return_lse,
    )


def _broadcast(bias: mx.array | None, whole: tuple[int, int, int, int]) -> tuple[bool, bool, bool, bool]:
    if bias is None:
        return False, False, False, False
    batch, heads, queries, keys = (1,) * (4 - bias.ndim) + bias.shape
    return batch != whole[0], heads != whole[1], queries != whole[2], keys != whole[3]
