"""Reading the pickles of PyTorch without running them: an interpreter of the few opcodes that describe tensors.

Nothing that a pickle names is ever imported or called. Names that PyTorch uses for tensors stand in a table and are
acted out here; any other one is refused by its name. Opcodes: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickletools
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

# A state dict needs about 30 opcodes and 200 bytes a tensor: room for 50,000 tensors, and a bound for bombs.
_MAX_BYTES = 64_000_000
_MAX_OPCODES = 2_000_000
_MAX_INTEGER_BITS = 128
_MAX_RANK = 64

# Name in torch: (name in MLX, bytes of a value). bfloat16 and the small floats are read by their bits.
DTYPES = {
    "float64": ("float64", 8),
    "double": ("float64", 8),
    "float32": ("float32", 4),
    "float": ("float32", 4),
    "float16": ("float16", 2),
    "half": ("float16", 2),
    "bfloat16": ("bfloat16", 2),
    "int64": ("int64", 8),
    "long": ("int64", 8),
    "int32": ("int32", 4),
    "int": ("int32", 4),
    "int16": ("int16", 2),
    "short": ("int16", 2),
    "int8": ("int8", 1),
    "uint8": ("uint8", 1),
    "uint16": ("uint16", 2),
    "uint32": ("uint32", 4),
    "uint64": ("uint64", 8),
    "bool": ("bool", 1),
    "complex64": ("complex64", 8),
    "float8_e4m3fn": ("float8_e4m3", 1),
    "float8_e5m2": ("float8_e5m2", 1),
    "float8_e4m3fnuz": ("float8_e4m3fnuz", 1),
    "float8_e5m2fnuz": ("float8_e5m2fnuz", 1),
    "float8_e8m0fnu": ("float8_e8m0", 1),
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}


class Refused(Exception):
    """The pickle holds something other than tensors, or is malformed; the text says what."""


@dataclass(frozen=True)
class Storage:
    """A run of values beside the pickle.  key: of its data.  dtype: in torch's words.  count: of values."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class StridedTensor:
    """A tensor as a window on a storage; offset and strides count values of `dtype`, one of `DTYPES`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to."""

    name: str


class _Mark:
    """Where a group of values on the stack begins."""


def read_pickle(stream: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """What the next pickle of a stream describes: dicts, lists, tuples, plain values, `StridedTensor`.

    Reads up to its last byte.  storages: filled with all that it refers to, by key.
    Raises Refused for a malformed pickle, one of more than 64 MB or two million opcodes, and one that refers to
    anything but tensors.
    """
    machine = _Machine({} if storages is None else storages)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # of escapes that are none
            machine.run(stream)
    except Refused:
        raise
    except _MALFORMED as error:
        raise Refused(f"it is malformed ({str(error)[:200] or type(error).__name__})") from error
    return machine.result()


_MALFORMED = (
    DeprecationWarning,
    ValueError,
    OverflowError,
    struct.error,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)


class _Bounded:
    """A stream that gives up after a number of bytes, whatever lengths the pickle claims."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.left = _MAX_BYTES

    def _take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Refused(f"it has more than {_MAX_BYTES // 10**6} MB")

    def read(self, count: int) -> bytes:
        self._take(count)
        return self.stream.read(count)

    def readline(self) -> bytes:
        line = self.stream.readline(min(self.left, 65536))
        self._take(len(line))
        return line

    def tell(self) -> int:
        return self.stream.tell()


class _Machine:
    """The stack and the memo of an unpickler, holding data only."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> None:
        """Act on every opcode up to the pickle's end."""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(_Bounded(stream))):
            if number > _MAX_OPCODES:
                raise Refused(f"it has more than {_MAX_OPCODES} opcodes")
            act = _ACTS.get(opcode.name)
            if act is None:
                raise Refused(f"it uses {opcode.name}, which no tensor needs")
            act(self, argument)

    def result(self) -> Any:
        if len(self.stack) != 1:
            raise Refused(f"it ends with {len(self.stack)} values instead of one")
        return self.stack[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if isinstance(value, _Mark):
            raise Refused("it is malformed (a group of values ends too early)")
        return value

    def pop_group(self) -> list[Any]:
        """What was pushed since the last mark."""
        group: list[Any] = []
        while not isinstance(value := self.stack.pop(), _Mark):
            group.append(value)
        group.reverse()
        return group

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise Refused(f"it is malformed (a {type(self.stack[-1]).__name__} where a {kind.__name__} belongs)")
        return self.stack[-1]

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int, float, type(None))):
                raise Refused(f"a dict has a key of type {type(key).__name__}")
            target[key] = value

    def refer(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in _CALLS and _storage_dtype(full) is None and _dtype(full) is None and full not in _CLASSES:
            raise Refused(f"it refers to {full}, which is not a part of a tensor")
        self.push(_Global(full))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(_call(function, arguments))

    def build(self) -> None:
        """Attributes of an object: of dicts PyTorch's bookkeeping (`_metadata`), which nothing here needs."""
        self.pop()
        if not isinstance(self.stack[-1], (dict, StridedTensor)):
            raise Refused("it sets attributes of something other than a dict or a tensor")

    def refer_by_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Refused("it is malformed (a name that is no text)")
        self.refer(module, name)

    def find_storage(self) -> None:
        reference = self.pop()
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            raise Refused("it refers to something outside that is no storage")
        _, kind, key, _, count, *view = reference
        dtype = _storage_dtype(kind.name) if isinstance(kind, _Global) else None
        if dtype is None or not isinstance(key, str) or not _natural(count):
            raise Refused("it has a storage of an unknown kind")
        if view and view[0] is not None:
            raise Refused("it has views of storages, as PyTorch wrote them before version 0.4")
        storage = self.storages.setdefault(key, Storage(key, dtype, count))
        if storage != Storage(key, dtype, count):
            raise Refused(f"it describes the storage {key!r} in two ways")
        self.push(storage)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _storage_dtype(full: str) -> str | None:
    module, _, name = full.rpartition(".")
    return _STORAGES.get(name) if module in ("torch", "torch.cuda", "torch.storage") else None


def _dtype(full: str) -> str | None:
    module, _, name = full.rpartition(".")
    return name if module == "torch" and name in DTYPES else None


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise Refused("it calls something that is no name")
    if function.name not in _CALLS:
        raise Refused(f"it calls {function.name}")
    return _CALLS[function.name](*arguments)


def _naturals(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > _MAX_RANK or not all(map(_natural, values)):
        raise Refused("a tensor has a shape or strides that are no small list of whole numbers")
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: str | None = None) -> StridedTensor:
    if not isinstance(storage, Storage) or not _natural(offset):
        raise Refused("a tensor has no storage")
    shape, strides = _naturals(shape), _naturals(strides)
    if len(shape) != len(strides):
        raise Refused(f"a tensor of {len(shape)} dimensions has {len(strides)} strides")
    return StridedTensor(storage, dtype or storage.dtype, offset, shape, strides)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> StridedTensor:
    name = _dtype(dtype.name) if isinstance(dtype, _Global) else None
    if name is None:
        raise Refused("a tensor has an unknown dtype")
    return _tensor(storage, offset, shape, strides, dtype=name)


def _parameter(data: Any, *_: Any) -> StridedTensor:
    if not isinstance(data, StridedTensor):
        raise Refused("a parameter holds no tensor")
    return data


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> StridedTensor:
    if not isinstance(kind, _Global) or kind.name not in _CLASSES:
        raise Refused("a tensor is of a class that is not PyTorch's")
    return _parameter(_call(function, arguments))


def _ordered(pairs: Sequence[Any] = ()) -> dict[Any, Any]:
    if pairs:
        raise Refused("it makes a dict from pairs")
    return {}


_CLASSES = ("torch.nn.parameter.Parameter", "torch.Tensor", "torch.nn.Parameter")
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": _naturals,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}


def _integer(machine: _Machine, value: int) -> None:
    if value.bit_length() > _MAX_INTEGER_BITS:
        raise Refused(f"it has a number of {value.bit_length()} bits")
    machine.push(value)


def _value(machine: _Machine, value: Any) -> None:
    machine.push(value)


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def act(machine: _Machine, _: Any) -> None:
        machine.push(tuple(reversed([machine.pop() for _ in range(count)])))

    return act


def _keep(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _append(machine: _Machine, values: list[Any]) -> None:
    machine.top(list).extend(values)


def _pair(machine: _Machine) -> list[Any]:
    value, key = machine.pop(), machine.pop()
    return [key, value]


_ACTS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"), _integer),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINFLOAT"), _value),
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING", "STRING", "SHORT_BINBYTES", "BINBYTES"), _value),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), _keep),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), lambda machine, index: machine.push(machine.memo[index])),
    "MEMOIZE": lambda machine, _: _keep(machine, len(machine.memo)),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "MARK": _constant(_Mark),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_group())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": lambda machine, _: _append(machine, [machine.pop()]),
    "APPENDS": lambda machine, _: _append(machine, machine.pop_group()),
    "SETITEM": lambda machine, _: machine.set_items(_pair(machine)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_group()),
    "GLOBAL": lambda machine, names: machine.refer(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.refer_by_stack(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.find_storage(),
}
