"""Flags as tables, for verbs that have many or share them with others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Flag:
    """A flag whose default is None: not given.

    names: on the command line, the first without its hyphens (- for _) being the setting's name.  type: of its value.
    panel: of the help.  help: for people.  metavar: of lists.
    """

    names: tuple[str, ...]
    type: Any
    panel: str
    help: str
    metavar: str | None = None

    @property
    def setting(self) -> str:
        """The name of the setting."""
        return self.names[0].split("/")[0].removeprefix("--").replace("-", "_")

    def parameter(self) -> inspect.Parameter:
        """As typer wants it."""
        option = typer.Option(*self.names, help=self.help, rich_help_panel=self.panel, metavar=self.metavar)
        kind = Annotated[self.type | None, option]
        return inspect.Parameter(self.setting, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def with_flags(flags: Sequence[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What gives a function, which takes **flags, a parameter for each flag of a table."""

    def given(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        every = [*own, *(flag.parameter() for flag in flags)]
        function.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
        function.__annotations__ = {one.name: one.annotation for one in every} | {"return": None}
        return function

    return given


def flag_of(setting: str) -> str:
    """The flag of a setting, as a person writes it."""
    return f"--{setting.replace('_', '-')}"


def given_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, by the names of their settings."""
    return {name: value for name, value in flags.items() if value is not None and value != []}
