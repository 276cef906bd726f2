"""Communication among some ranks: one face over every backend of mx.distributed.

What a backend can do stays an MLX operation: lazy, compilable, on its own stream. Elsewhere the arrays travel over
links (see links.py), at the time of the call. Sums over links are made in the order of the ranks, in float32, so all
ranks of a group get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.distributed.links import Message
from mlxlm.distributed.world import SCATTERS
from mlxlm.errors import DistributedError, UsageError

if TYPE_CHECKING:
    from mlxlm.distributed.world import World

_DTYPES = {
    str(dtype).removeprefix("mlx.core."): dtype
    for dtype in (
        mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64, mx.float16,
        mx.bfloat16, mx.float32,
    )
}  # fmt: skip


class Comm:
    """A group of ranks that talk to each other. Made by `World.comm`.

    ranks: of the world.  index: this rank's place among them.  size: how many they are.  name: for error messages.
    native: the backend's own group, None where links do the work.

    All of the group must call the same operations in the same order. With one rank every operation is the identity.
    Operations are no functions to differentiate; see regions.py. `what` names an operation in error messages.
    """

    def __init__(self, world: World, ranks: tuple[int, ...], name: str, native: mx.distributed.Group | None):
        self.world, self.ranks, self.name, self.native = world, ranks, name, native
        self.index, self.size = ranks.index(world.rank), len(ranks)
        self._count = 0

    @property
    def lazy(self) -> bool:
        """Whether sums and gathers are operations of a graph; else they happen when they are called.

        What happens in the middle of a function that is differentiated keeps all arrays that it was made of until the
        gradients are there: tensor parallelism among some of the ranks of a ring takes more memory than among all.
        """
        return self.size == 1 or self.native is not None

    def sum(self, x: mx.array, what: str = "sum") -> mx.array:
        """The sum over the ranks, on all of them."""
        if self.size == 1:
            return x
        if self.native is not None:
            return self._native(mx.distributed.all_sum, x, what)
        flat = x.reshape(-1)
        if self.size == 2 or flat.size < 4096:
            return _added(self._exchange(x, what), x.dtype)
        # Every rank adds up one part and sends it to all others: 2 (n - 1) / n of the bytes instead of n - 1.
        length = -(-flat.size // self.size)
        padded = mx.pad(flat, [(0, length * self.size - flat.size)]).reshape(self.size, length)
        own = self._scattered_sum(padded, what)
        return mx.concatenate(self._exchange(own, what))[: flat.size].reshape(x.shape)

    def mean(self, x: mx.array, what: str = "mean") -> mx.array:
        """The mean over the ranks, on all of them."""
        return x if self.size == 1 else self.sum(x, what) / self.size

    def stack(self, x: mx.array, what: str = "gather") -> mx.array:
        """The arrays of all ranks, (size, ...); they have the same shape."""
        if self.size == 1:
            return x[None]
        if self.native is not None:
            return self._native(mx.distributed.all_gather, x[None], what)
        return mx.stack(self._exchange(x, what))

    def gather(self, x: mx.array, axis: int = 0, what: str = "gather") -> mx.array:
        """The arrays of all ranks one after another along an axis; they have the same shape."""
        if self.size == 1:
            return x
        return mx.concatenate(list(self.stack(x, what)), axis=axis)

    def reduce_scatter(self, x: mx.array, what: str = "reduce-scatter") -> mx.array:
        """Rank i's part of the sum: x (size * n, ...) -> (n, ...), rows i * n to (i + 1) * n.

        Where the backend has no such call, a sum of which the part is kept.  Raises UsageError for other row numbers.
        """
        if x.shape[0] % self.size:
            raise UsageError(f"{x.shape[0]} rows can't be scattered evenly to {self.size} ranks")
        if self.size == 1:
            return x
        rows = x.shape[0] // self.size
        if self.native is None:
            return self._scattered_sum(x.reshape(self.size, rows, *x.shape[1:]), what)
        if self.world.backend in SCATTERS:
            return self._native(mx.distributed.sum_scatter, x, what)
        return self._native(mx.distributed.all_sum, x, what)[self.index * rows : (self.index + 1) * rows]

    def broadcast(self, x: mx.array, root: int = 0, what: str = "broadcast") -> mx.array:
        """The array of the rank at index `root`, on all of them; elsewhere x gives shape and dtype."""
        if self.size == 1:
            return x
        if self.native is not None:
            return self._native(mx.distributed.all_sum, x if self.index == root else mx.zeros_like(x), what)
        label = self._label(what, x)
        if self.index != root:
            return self._take(root, label)
        for index in range(self.size):
            if index != root:
                self._put(x, index, label)
        return x

    def send(self, x: mx.array, to: int, what: str = "array") -> None:
        """Send an array to the rank at index `to`; evaluated now, and not waiting for its being received."""
        self._put(x, to, {"what": what})

    def receive(self, source: int, what: str = "array") -> mx.array:
        """The next array that the rank at index `source` sends to this one; it must be sent under the same `what`."""
        return self._take(source, {"what": what})

    def rotate(self, arrays: Sequence[mx.array], what: str = "rotation") -> list[mx.array]:
        """Give arrays to the next rank of the group and get those of the one before; the first is the last's next."""
        if self.size == 1:
            return list(arrays)
        for number, array in enumerate(arrays):
            self.send(array, (self.index + 1) % self.size, f"{what} {number}")
        return [self.receive((self.index - 1) % self.size, f"{what} {number}") for number in range(len(arrays))]

    def barrier(self, what: str = "barrier") -> None:
        """Wait until all ranks of the group are here."""
        with self.world.waiting(what):
            mx.eval(self.sum(mx.array(1), what))

    def agree(self, text: str, what: str) -> None:
        """Raise DistributedError, naming the ranks apart, unless all ranks of the group give the same text."""
        from hashlib import sha256

        digest = mx.array(list(sha256(text.encode()).digest()), dtype=mx.uint8)
        with self.world.waiting(what):
            rows = self.stack(digest, what).tolist()
        kinds = [rows.index(row) for row in rows]
        apart = [self.ranks[i] for i, kind in enumerate(kinds) if kind != max(set(kinds), key=kinds.count)]
        if apart:
            names = f"rank{'s' * (len(apart) > 1)} {', '.join(map(str, apart))}"
            raise DistributedError(f"the ranks disagree about {what}: {names} of {len(rows)} differ from the others")

    def _native(self, operation: Callable[..., mx.array], x: mx.array, what: str) -> mx.array:
        """An operation of the backend, computed after the one that was called before it, on every rank alike.

        MLX may otherwise order operations that don't depend on each other by the rest of the graph, which differs from
        rank to rank with the lengths of its rows: sums would meet other sums.
        """
        self.world.last_asked = what
        last = self.world.last_operation
        if last is not None:
            (x,) = mx.depends([x], [last])
        self.world.last_operation = result = operation(x, group=self.native)
        return result

    # ------------------------------------------------------------------------------------------------ over links

    def _label(self, what: str, x: mx.array) -> dict[str, Any]:
        """What all ranks must send alike in one operation of the group."""
        self._count += 1
        return {"what": what, "number": self._count, "dtype": _name(x.dtype), "shape": list(x.shape)}

    def _exchange(self, x: mx.array, what: str) -> list[mx.array]:
        """The arrays of all ranks, of the same shape, this one's among them."""
        label = self._label(what, x)
        for step in range(1, self.size):
            self._put(x, (self.index + step) % self.size, label)
        return [x if index == self.index else self._take(index, label) for index in range(self.size)]

    def _scattered_sum(self, parts: mx.array, what: str) -> mx.array:
        """The sum over ranks of row `index` of parts (size, ...)."""
        label = self._label(what, parts)
        for step in range(1, self.size):
            to = (self.index + step) % self.size
            self._put(parts[to], to, label)
        mine = [parts[i] if i == self.index else self._take(i, label) for i in range(self.size)]
        return _added(mine, parts.dtype)

    def _put(self, x: mx.array, to: int, label: dict[str, Any]) -> None:
        self.world.settle()
        mx.eval(x)
        header = {**label, "kept": [_name(x.dtype), *x.shape]}
        data = memoryview(mx.contiguous(x.reshape(-1)).view(mx.uint8)) if x.size else b""
        self._links().send(self.ranks[to], self.name, header, data)

    def _take(self, source: int, label: dict[str, Any]) -> mx.array:
        self.world.settle()
        rank, what = self.ranks[source], label["what"]
        with self.world.waiting(f"{self.name}: {what}", together=False):
            message = self._links().receive(rank, self.name, self.world.timeout, what)
        given = {key: message.header.get(key) for key in label}
        if given != label:
            raise DistributedError(
                f"rank {self.world.rank} and rank {rank} disagree: expected {_told(label)}, got {_told(given)}"
            )
        return _array(message)

    def _links(self) -> Any:
        if self.world.links is None:
            raise UsageError("a world of one process has nobody to send to")
        return self.world.links


def _added(parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
    """The sum in the order of the ranks; 16-bit floats are added in float32."""
    wide: Callable[[mx.array], mx.array] = (
        (lambda x: x.astype(mx.float32)) if dtype in (mx.float16, mx.bfloat16) else lambda x: x
    )
    total = wide(parts[0])
    for part in parts[1:]:
        total = total + wide(part)
    return total.astype(dtype)


def _array(message: Message) -> mx.array:
    name, *shape = message.header["kept"]
    dtype = _DTYPES[name]
    if not message.data:
        return mx.zeros(shape, dtype=dtype)
    return mx.array(memoryview(message.data)).view(dtype).reshape(shape)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _told(label: dict[str, Any]) -> str:
    number = f" number {label['number']}" if "number" in label else ""
    kind = f" ({label['dtype']} {tuple(label['shape'] or ())})" if "dtype" in label else ""
    return f"{label['what']!r}{number}{kind}"
