"""Which keys a query may see, described as structure instead of as an array of size O(Lq * Lk)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import mlx.core as mx

from mlxlm.errors import AttentionError

_INTEGERS = (mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64)


class Intervals(NamedTuple):
    """The keys that each query sees, as half-open ranges: k is visible iff low <= k < high, or k < prefix.

    low, high: int32 (1 | B, Lq), clipped to 0..Lk.  prefix: int32 (1 | B,) or None; present only when a window
    cuts the range away from the prefix.  Segments are not in here: they are compared by id.
    """

    low: mx.array
    high: mx.array
    prefix: mx.array | None


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionMask:
    """Which keys each query sees.

    A query at local index i stands at position i + query_offset, a key at its index j. The key is visible iff
    (causal and window allow it, or j is below the prefix) and j is below key_lengths and both are in one segment.

    causal: a query sees keys up to its own position, default False.
    query_offset: position of the first query, default Lk - Lq (the last query meets the last key). An int, or an
        integer array of shape () or (B,) when it changes from call to call of a compiled function or by request.
    window: w >= 1: a query at position p sees keys p-w+1..p, and p-w+1..p+w-1 when not causal. Default: no limit.
    prefix_lengths: (B,) keys below it are seen by every query (prefix LM); no effect without causal or window.
    key_lengths: (B,) number of keys that exist; the rest is right padding.
    query_segments, key_segments: (B, Lq) and (B, Lk) integer ids, given together: only equal ids see each other.
    at_keys: a promise that every query stands at one of the keys, for offsets that are arrays: a causal query then
        sees at least one key, and nothing has to be computed to find out. Default False.

    (B,) may also be (1,) and (B, L) may be (1, L), for all rows alike. Arrays become int32; Python lists and numpy
    arrays are taken too. Raises AttentionError for a field of another kind or rank.
    """

    causal: bool = False
    query_offset: int | mx.array | None = None
    window: int | None = None
    prefix_lengths: mx.array | None = None
    key_lengths: mx.array | None = None
    query_segments: mx.array | None = None
    key_segments: mx.array | None = None
    at_keys: bool = False
    _arrays: bool = field(init=False, repr=False, default=False)
    _dense: dict[tuple[int, int, int], mx.array | None] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.window is not None and (isinstance(self.window, bool) or self.window < 1):
            raise AttentionError(f"window is {self.window!r}; expected None or a number of keys of at least 1")
        if self.query_offset is not None and not isinstance(self.query_offset, int):
            if hasattr(self.query_offset, "__index__") and not isinstance(self.query_offset, mx.array):
                object.__setattr__(self, "query_offset", int(self.query_offset))  # a numpy integer
            else:
                self._convert("query_offset", ranks=(0, 1))
        if self.prefix_lengths is not None:
            self._convert("prefix_lengths", ranks=(1,))
        if self.key_lengths is not None:
            self._convert("key_lengths", ranks=(1,))
        if self.query_segments is None and self.key_segments is None:
            return
        if self.query_segments is None or self.key_segments is None:
            missing = "key_segments" if self.key_segments is None else "query_segments"
            raise AttentionError(
                f"{missing} is missing; segments need both query_segments (B, Lq), key_segments (B, Lk)"
            )
        same = self.query_segments is self.key_segments
        self._convert("query_segments", ranks=(2,))
        if same:  # the identity tells `may_have_empty_rows` that a token meets itself
            object.__setattr__(self, "key_segments", self.query_segments)
        else:
            self._convert("key_segments", ranks=(2,))

    def _convert(self, name: str, ranks: tuple[int, ...]) -> None:
        """Make the field `name` an int32 array of one of the given ranks."""
        given = getattr(self, name)
        try:
            value = given if isinstance(given, mx.array) else mx.array(given)
        except (TypeError, ValueError):
            raise AttentionError(f"{name} is a {type(given).__name__}; expected integers or an integer array") from None
        if value.dtype not in _INTEGERS or value.ndim not in ranks:
            shapes = " or ".join(("()", "(B,)", "(B, L)")[rank] for rank in ranks)
            raise AttentionError(f"{name} is {_kind(value)}; expected integers of shape {shapes}")
        object.__setattr__(self, "_arrays", True)
        object.__setattr__(self, name, value if value.dtype == mx.int32 else value.astype(mx.int32))

    # What is known without evaluating an array: decided in Python, so it may steer the choice of a kernel.

    @property
    def has_arrays(self) -> bool:
        """Whether any field is an array."""
        return self._arrays

    def offset(self, query_length: int, key_length: int) -> int | mx.array:
        """Position of the first query: an int where it is known in Python, otherwise an array () or (B,)."""
        return key_length - query_length if self.query_offset is None else self.query_offset

    def is_plain(self, query_length: int, key_length: int) -> bool:
        """True when every query is known to see every key."""
        if self.key_lengths is not None or self.query_segments is not None:
            return False
        if not self.causal and self.window is None:
            return True
        offset = self.offset(query_length, key_length)
        if not isinstance(offset, int):
            return False
        return (not self.causal or offset >= key_length - 1) and not self._window_bites(
            offset, query_length, key_length
        )

    def is_causal_lower_right(self, query_length: int, key_length: int) -> bool:
        """True when the mask is known to be causality alone, with the last query at the last key."""
        if not self.causal or self.key_lengths is not None or self.query_segments is not None:
            return False
        if self.prefix_lengths is not None:
            return False
        offset = key_length - query_length
        if self.query_offset is not None and not (isinstance(self.query_offset, int) and self.query_offset == offset):
            return False
        return self.window is None or not self._window_bites(offset, query_length, key_length)

    def may_have_empty_rows(self, query_length: int, key_length: int) -> bool:
        """False only when every query is known to see at least one key."""
        if self.key_lengths is not None:
            return True
        if not self.causal and self.window is None:
            return self.query_segments is not None and self.query_segments is not self.key_segments
        if self.at_keys and self.query_segments is None:
            return False
        offset = self.offset(query_length, key_length)
        if not isinstance(offset, int):
            return True
        if self.query_segments is not None:
            # A token that stands at its own key sees itself, whatever the window and the segments are.
            return not (self.query_segments is self.key_segments and offset == 0 and query_length <= key_length)
        first, last = offset, offset + query_length - 1
        if self.window is None:
            return first < 0
        reach = 0 if self.causal else self.window - 1  # how far ahead of itself a query sees
        return first + reach < 0 or last - self.window + 1 >= key_length

    def _window_bites(self, offset: int, query_length: int, key_length: int) -> bool:
        """Whether the window hides any key that causality (or nothing) would show, for an offset known in Python."""
        if self.window is None:
            return False
        last = offset + query_length - 1
        behind = last - self.window + 1 > 0
        return behind or (not self.causal and offset + self.window < key_length)

    def key_range(self, rows: tuple[int, int], query_length: int, key_length: int) -> tuple[int, int]:
        """The keys [start, stop) outside of which no query of rows [start, stop) sees any, as far as Python knows.

        Empty (start == stop) when the rows are known to see nothing.
        """
        offset = self.offset(query_length, key_length)
        if not isinstance(offset, int) or self.prefix_lengths is not None:
            return 0, key_length
        first, last = offset + rows[0], offset + rows[1] - 1
        start, stop = 0, key_length
        if self.causal:
            stop = last + 1
        if self.window is not None:
            start = first - self.window + 1
            if not self.causal:
                stop = last + self.window
        start, stop = min(max(start, 0), key_length), min(max(stop, 0), key_length)
        return (start, stop) if start < stop else (0, 0)

    def validate(self, batch: int, query_length: int, key_length: int) -> None:
        """Raise AttentionError when an array of the mask does not fit queries (B, Lq) and keys (B, Lk)."""
        for name, shape in (
            ("query_offset", (batch,)),
            ("prefix_lengths", (batch,)),
            ("key_lengths", (batch,)),
            ("query_segments", (batch, query_length)),
            ("key_segments", (batch, key_length)),
        ):
            value = getattr(self, name)
            if value is None or isinstance(value, int) or value.ndim == 0:
                continue
            if value.shape != shape and value.shape != (1, *shape[1:]):
                raise AttentionError(f"mask.{name} has shape {value.shape}; expected {shape} for this query and key")

    # What has to be computed: arrays built from the arrays of the mask, never evaluated here.

    def query_positions(self, query_length: int, key_length: int, rows: tuple[int, int] | None = None) -> mx.array:
        """Positions of the queries in `rows` (default: all): int32 (1 | B, rows)."""
        start, stop = rows or (0, query_length)
        offset = self.offset(query_length, key_length)
        if isinstance(offset, int):
            return mx.arange(offset + start, offset + stop, dtype=mx.int32)[None]
        return offset.reshape(-1, 1) + mx.arange(start, stop, dtype=mx.int32)

    def intervals(self, query_length: int, key_length: int) -> Intervals:
        """Causality, window, prefix and key lengths as ranges of keys, see `Intervals`; segments are left out."""
        position = self.query_positions(query_length, key_length)
        low = mx.zeros_like(position)
        high = mx.full(position.shape, key_length, dtype=mx.int32)
        if self.causal:
            high = position + 1
        if self.window is not None:
            low = position - (self.window - 1)
            if not self.causal:
                high = position + self.window
        prefix = self.prefix_lengths
        if prefix is not None and self.window is None:
            high, prefix = mx.maximum(high, prefix[:, None]), None
        if self.key_lengths is not None:
            high = mx.minimum(high, self.key_lengths[:, None])
            prefix = prefix if prefix is None else mx.minimum(prefix, self.key_lengths)
        low, high = mx.clip(low, 0, key_length), mx.clip(high, 0, key_length)
        if low.shape != high.shape:
            low = mx.broadcast_to(low, high.shape)
        return Intervals(low, high, prefix if prefix is None else mx.clip(prefix, 0, key_length))

    def dense(self, batch: int, query_length: int, key_length: int) -> mx.array | None:
        """The mask as an array: bool (1 | B, 1, Lq, Lk), True where visible; None when nothing is masked.

        The last result is kept, because all layers of a model ask with the same mask.
        """
        wanted = (batch, query_length, key_length)
        if wanted not in self._dense:
            self._dense.clear()
            self._dense[wanted] = self.dense_block((0, query_length), (0, key_length), query_length, key_length)
        return self._dense[wanted]

    def dense_block(
        self,
        rows: tuple[int, int],
        keys: tuple[int, int],
        query_length: int,
        key_length: int,
        indices: tuple[mx.array, mx.array] | None = None,
    ) -> mx.array | None:
        """The part of the mask for queries [start, stop) and keys [start, stop): bool (1 | B, 1, rows, keys).

        None when every query of the block is known to see every key of it. indices: int32 arrays that hold `rows` and
        `keys` counted out; a caller gives them to make the block depend on them (and so be computed after them).
        """
        query, key = indices or (mx.arange(*rows, dtype=mx.int32), mx.arange(*keys, dtype=mx.int32))
        visible = self._positional(rows, keys, query_length, key_length, query, key)
        if self.key_lengths is not None:
            exists = key < self.key_lengths.reshape(-1, 1, 1, 1)
            visible = exists if visible is None else visible & exists
        if self.query_segments is not None:
            query_ids, key_ids = (
                self.query_segments[:, None, slice(*rows), None],
                self.key_segments[:, None, None, slice(*keys)],
            )
            same = query_ids == key_ids
            visible = same if visible is None else visible & same
        if visible is not None and visible.shape[2] != rows[1] - rows[0]:
            visible = mx.broadcast_to(visible, (*visible.shape[:2], rows[1] - rows[0], visible.shape[3]))
        return visible

    def _positional(
        self,
        rows: tuple[int, int],
        keys: tuple[int, int],
        query_length: int,
        key_length: int,
        query: mx.array,
        key: mx.array,
    ) -> mx.array | None:
        """Causality, window and prefix of a block; comparisons that can't hide a key of it are left out."""
        offset = self.offset(query_length, key_length)
        known = isinstance(offset, int)
        window = self.window
        later = self.causal and not (known and offset + rows[0] >= keys[1] - 1)
        behind = window is not None and not (known and offset + rows[1] - window <= keys[0])
        ahead = window is not None and not self.causal and not (known and offset + rows[0] + window >= keys[1])
        if not (later or behind or ahead):
            return None
        position = query[:, None]
        if not known or offset != 0:
            position = (offset if known else offset.reshape(-1, 1, 1, 1)) + position
        position = position.reshape(-1, 1, *position.shape[-2:])
        tests = []
        if later:
            tests.append(key <= position)
        if behind:
            tests.append(key > position - window)
        if ahead:
            tests.append(key < position + window)
        visible = tests[0]
        for test in tests[1:]:
            visible = visible & test
        if self.prefix_lengths is not None:
            visible = visible | (key < self.prefix_lengths.reshape(-1, 1, 1, 1))
        return visible

    def describe(self) -> str:
        """The parts in use, such as "causal+window 8+segments", or "plain"."""
        parts = ["causal"] if self.causal else []
        if self.query_offset is not None:
            parts.append(f"offset {self.query_offset}" if isinstance(self.query_offset, int) else "offset array")
        if self.window is not None:
            parts.append(f"window {self.window}")
        named = (("prefix_lengths", "prefix"), ("key_lengths", "lengths"), ("query_segments", "segments"))
        parts += [label for name, label in named if getattr(self, name) is not None]
        return "+".join(parts) or "plain"

    def __repr__(self) -> str:
        given = [
            f"{f.name}={value if not isinstance(value, mx.array) else _kind(value)}"
            for f in fields(self)
            if f.repr and (value := getattr(self, f.name)) is not None and value is not False
        ]
        return f"AttentionMask({', '.join(given)})"


def _kind(value: Any) -> str:
    """Dtype and shape of an array, without evaluating it."""
    return f"{str(value.dtype).removeprefix('mlx.core.')}{list(value.shape)}"
