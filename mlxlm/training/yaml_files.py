"""YAML files of settings, and single values of them from the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlxlm.errors import ConfigError, UsageError, nearest


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number, as YAML 1.2 does, and refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        names = [key.value for key, _ in node.value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path, expected: str) -> dict[str, Any]:
    """The values of a file, unchecked.  expected: what the file should be, for the error.

    Raises ConfigError when it can't be read or is no YAML mapping, with the line.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {expected}")
    return values


def parse_override(text: str) -> tuple[str, Any]:
    """("training.learning_rate", 0.001) from "training.learning_rate=1e-3"; values are YAML. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {text!r}; expected NAME=VALUE such as training.learning_rate=1e-3")
    try:
        return name.strip(), yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise UsageError(f"--set {text!r}: the value is not YAML") from None


def unknown_keys(prefix: str, values: Mapping[Any, Any], names: Iterable[str]) -> list[str]:
    """A sentence for each key that is none of the names, with the nearest one.  prefix: of the keys, for people."""
    names = list(names)
    return [f"unknown key {f'{prefix}{name}'!r}{nearest(str(name), names)}" for name in values if name not in names]


def of_type(value: Any, kind: str) -> bool:
    """Whether a value is of an annotated type, such as "float | None"."""
    if value is None:
        return "None" in kind
    if isinstance(value, bool) or "bool" in kind:
        return isinstance(value, bool) and "bool" in kind
    if "tuple" in kind:
        return isinstance(value, (list, tuple)) and all(of_type(one, "float") for one in value)
    if "float" in kind:
        return isinstance(value, (int, float))
    return isinstance(value, int if "int" in kind else str)
