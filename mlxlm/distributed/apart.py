"""Work that must leave no graph behind.

While MLX differentiates a function, whatever is evaluated in it keeps the graph that it came from, intermediate arrays
included, since the gradient might need them. What has a gradient of its own, and must be evaluated on the way because
it is to be sent, is better computed in another thread: there nothing is being differentiated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

_local = threading.local()
_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="apart")


def apart(function: Callable[..., list[mx.array]], arrays: Sequence[mx.array]) -> list[mx.array]:
    """function(*arrays), evaluated, as arrays without a history.

    The function sees copies of the arrays. It must build no graph on others that aren't evaluated, and draw no random
    numbers.
    """
    mx.eval(arrays)
    return _worker.submit(_run, function, [_frozen(array) for array in arrays]).result()


_Frozen = tuple[mx.array, mx.Dtype, tuple[int, ...]]


def _frozen(array: mx.array) -> _Frozen:
    """The bytes of an evaluated array as a new one; the view that makes them values again is for the other thread."""
    if not array.size:
        return mx.array([], dtype=mx.uint8), array.dtype, array.shape
    return mx.array(memoryview(mx.contiguous(array.reshape(-1)).view(mx.uint8))), array.dtype, array.shape


def _run(function: Callable[..., list[mx.array]], arrays: Sequence[_Frozen]) -> list[mx.array]:
    if not hasattr(_local, "stream"):
        _local.stream = mx.new_stream(mx.default_device())  # MLX's streams belong to threads
    with mx.stream(_local.stream):
        found = function(*(data.view(dtype).reshape(shape) for data, dtype, shape in arrays))
        mx.eval(found)
    return found
