"""Reading the fields of a request: each by name and kind, and none left over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mlxlm.errors import nearest
from mlxlm.server.problems import Problem

T = TypeVar("T")


def wrong(name: str, value: Any, expected: str) -> Problem:
    """The error for a field with a wrong value."""
    return Problem(400, f"{name} is {value!r:.60}, but must be {expected}", param=name, code="invalid_value")


def whole(low: int, high: int | None = None) -> Callable[[str, Any], int]:
    """A whole number of `low` to `high`."""

    def read(name: str, value: Any) -> int:
        valid = isinstance(value, int) and not isinstance(value, bool)
        if not valid or value < low or (high is not None and value > high):
            raise wrong(name, value, f"a whole number of {low} " + ("or more" if high is None else f"to {high}"))
        return int(value)

    return read


def number(low: float, high: float) -> Callable[[str, Any], float]:
    """A number of `low` to `high`."""

    def read(name: str, value: Any) -> float:
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not valid or not low <= value <= high:
            raise wrong(name, value, f"a number of {low:g} to {high:g}")
        return float(value)

    return read


def flag(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    return value


def items(name: str, value: Any) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise wrong(name, value, "a list")
    return value


def one_of(*choices: Any) -> Callable[[str, Any], Any]:
    """One of these values."""

    def read(name: str, value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise wrong(name, value, " or ".join(repr(choice) for choice in choices))
        return value

    return read


def anything(name: str, value: Any) -> Any:
    """A field that does not change the answer."""
    return value


class Fields:
    """The fields of an object. What isn't taken by the time of `done` is an error, for it might change the answer.

    where: names the object in errors, empty for the request itself.
    """

    def __init__(self, values: Any, where: str = ""):
        if not isinstance(values, dict):
            raise Problem(400, f"{where or 'the request'} must be a JSON object", param=where or None)
        self._left: dict[str, Any] = dict(values)
        self._known: list[str] = []
        self._prefix = f"{where}." if where else ""

    def take(self, name: str, read: Callable[[str, Any], T], default: Any = None) -> Any:
        """The value of a field as `read` has it, `default` where it is absent or null."""
        self._known.append(name)
        value = self._left.pop(name, None)
        return default if value is None else read(self._prefix + name, value)

    def need(self, name: str, read: Callable[[str, Any], T]) -> T:
        """The value of a field that must be there."""
        value = self.take(name, read)
        if value is None:
            raise Problem(400, f"{self._prefix}{name} is missing", param=self._prefix + name, code="missing_field")
        return value  # type: ignore[no-any-return]

    def done(self, refused: Iterable[str] = ()) -> None:
        """Raise Problem for what is left.  refused: names that the protocol has but this server has not."""
        for name, value in self._left.items():
            param = self._prefix + name
            if name in refused:
                if value is None or value is False:
                    continue
                raise Problem(400, f"{param} is not supported by this server", param=param, code="unsupported_field")
            hint = nearest(name, self._known)
            raise Problem(400, f"unknown field {param[:60]!r}{hint}", param=param[:60], code="unknown_field")
