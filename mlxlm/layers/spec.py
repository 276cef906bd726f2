"""Specs: small frozen dataclasses that describe a choice and build its module.

A model's configuration is a tree of specs and nothing else. It prints, compares, hashes, and goes to JSON and back:

    >>> spec = RMSNormSpec(dim=8)
    >>> spec.to_json()
    {'kind': 'RMSNorm', 'dim': 8}
    >>> Spec.from_json(spec.to_json()) == spec
    True

`kind` is the class name without its suffix `Spec`. Fields at their default are left out of the JSON.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxlm.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of all specs. A subclass is a frozen keyword-only dataclass; most have `build()`."""

    _kinds: ClassVar[dict[str, type[Spec]]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # dataclass(slots=True) would make the class twice; a second definition of a kind is a mistake otherwise.
        if cls.kind() in Spec._kinds:
            raise TypeError(f"two specs of kind {cls.kind()!r}: {Spec._kinds[cls.kind()]} and {cls}")
        Spec._kinds[cls.kind()] = cls

    @classmethod
    def kind(cls) -> str:
        """The name of this choice in JSON."""
        return cls.__name__.removesuffix("Spec")

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` turns back into an equal spec."""
        plain: dict[str, Any] = {"kind": self.kind()}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != _default(field):
                plain[field.name] = _to_plain(value)
        return plain

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Any:
        """The spec that `plain` describes. Raises ConfigError for unknown kinds, unknown or missing fields."""
        if not isinstance(plain, dict) or "kind" not in plain:
            raise ConfigError(f"a spec is a JSON object with a 'kind', not {plain!r}")
        kind = plain["kind"]
        if kind not in Spec._kinds:
            raise ConfigError(f"unknown kind of spec {kind!r}{nearest(kind, Spec._kinds)}")
        cls = Spec._kinds[kind]
        fields = {field.name: field for field in dataclasses.fields(cls)}
        given = {name: value for name, value in plain.items() if name != "kind"}
        for name in given:
            if name not in fields:
                raise ConfigError(f"{kind} has no field {name!r}{nearest(name, fields)}")
        missing = [
            name for name, field in fields.items() if name not in given and _default(field) is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{kind} lacks {', '.join(missing)}")
        return cls(**{name: _from_plain(value) for name, value in given.items()})


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """The fields in which two specs differ, as "decoder.layers.0.attention.window: 5 / None"."""
    if isinstance(one, Spec) and isinstance(other, Spec) and type(one) is type(other):
        names = [field.name for field in dataclasses.fields(one)]
        parts = [(name, getattr(one, name), getattr(other, name)) for name in names]
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        parts = [(str(index), a, b) for index, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [f"{path}: {one} / {other}"]
    found = [differences(a, b, f"{path}.{name}" if path else name) for name, a, b in parts]
    return [line for lines in found for line in lines]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


def _to_plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return value


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return Spec.from_json(value)
    if isinstance(value, list):
        return tuple(_from_plain(item) for item in value)
    return value
