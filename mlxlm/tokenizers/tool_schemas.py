"""JSON schemas of Python functions, for templates that tell a model which tools it may call.

The result has the form that chat templates expect and transformers makes:
{"type": "function", "function": {"name", "description", "parameters", "return"?}}.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from mlxlm.errors import TokenizerError

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_PLAIN = {**_SCALARS, list: "array", tuple: "array", dict: "object"}
_SECTION = re.compile(r"^(Args|Arguments|Returns|Raises|Yields|Examples?):\s*$")
_ARGUMENT = re.compile(r"^(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def describe_function(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a function from its type hints and its docstring in Google style ("Args:", "name: text").

    An argument's text may end in `(choices: ["a", "b"])`. Raises TokenizerError when a hint or a text is missing, or
    a hint has no counterpart in JSON.
    """
    name = getattr(function, "__name__", type(function).__name__)
    doc = inspect.getdoc(function)
    if not doc:
        raise TokenizerError(f"the tool {name} has no docstring; the model learns from it what the tool does")
    description, arguments, returns = _parse_doc(doc)
    properties, required, returned = _read_signature(function, name)
    for argument, schema in properties.items():
        if argument not in arguments:
            raise TokenizerError(f"the docstring of the tool {name} does not describe its argument {argument!r}")
        text = arguments[argument]
        choices = _CHOICES.search(text)
        if choices:
            schema["enum"] = _parse_choices(choices.group(1), name, argument)
            text = text[: choices.start()].strip()
        schema["description"] = text
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    result: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if returned is not None:
        result["return"] = {**returned, "description": returns} if returns else returned
    return {"type": "function", "function": result}


def _read_signature(
    function: Callable[..., Any], name: str
) -> tuple[dict[str, dict[str, Any]], list[str], dict[str, Any] | None]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
        hints = typing.get_type_hints(function if inspect.isroutine(function) else function.__call__)
    except (TypeError, ValueError, NameError) as error:
        raise TokenizerError(f"the signature of the tool {name} can't be read: {error}") from None
    if parameters and parameters[0].name in ("self", "cls") and parameters[0].name not in hints:
        parameters = parameters[1:]
    properties, required = {}, []
    for parameter in parameters:
        if parameter.name not in hints:
            raise TokenizerError(f"the argument {parameter.name!r} of the tool {name} has no type hint")
        where = f"the argument {parameter.name!r} of the tool {name}"
        properties[parameter.name] = _schema(hints[parameter.name], where)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    returned = None
    if "return" in hints:
        try:
            returned = _schema(hints["return"], name)
        except TokenizerError:  # a model never writes the result, so its type may be anything
            returned = None
    return properties, required, returned


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint is None:
        return {"type": "null"}
    if origin is None and isinstance(hint, type) and hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enumeration([member.value for member in hint], where)
    if origin is typing.Literal:
        return _enumeration(list(arguments), where)
    if origin in (typing.Union, types.UnionType):
        options = [argument for argument in arguments if argument is not type(None)]
        return _union(options, type(None) in arguments, where)
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0], where)}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_schema(argument, where) for argument in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], where)}
    raise TokenizerError(
        f"{where} has the type {hint!r}, which has no JSON schema; use str, int, float, bool, list, dict, Literal or "
        "an Enum, or give the tool as a schema"
    )


def _enumeration(values: list[Any], where: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise TokenizerError(
            f"{where} offers the choices {values!r}; only text, numbers, booleans and None can be written"
        )
    kinds = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(options: list[Any], nullable: bool, where: str) -> dict[str, Any]:
    schemas = [_schema(option, where) for option in options]
    if len(schemas) == 1:
        result = schemas[0]
    elif all(set(schema) == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        kinds = sorted({schema["type"] for schema in schemas})
        result = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        result = {"anyOf": schemas}
    return {**result, "nullable": True} if nullable else result


def _parse_doc(doc: str) -> tuple[str, dict[str, str], str]:
    """Description, texts of the arguments, text of the result."""
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in doc.splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = "Args" if heading.group(1) == "Arguments" else heading.group(1)
            sections.setdefault(current, [])
        else:
            sections[current].append(line)
    returns = " ".join(line.strip() for line in sections.get("Returns", []) if line.strip())
    return "\n".join(sections[""]).strip(), _parse_arguments(sections.get("Args", [])), returns


def _parse_arguments(lines: list[str]) -> dict[str, str]:
    lines = [line for line in lines if line.strip()]
    depth = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    arguments: dict[str, str] = {}
    current = None
    for line in lines:
        match = _ARGUMENT.match(line[depth:])
        if match:
            current = match.group(1)
            arguments[current] = match.group(2).strip()
        elif current is not None:  # indented deeper, or a line without a name: the text goes on
            arguments[current] = f"{arguments[current]} {line.strip()}".strip()
    return arguments


def _parse_choices(text: str, name: str, argument: str) -> list[Any]:
    try:
        choices = json.loads(text)
    except json.JSONDecodeError:
        choices = None
    if not isinstance(choices, list):
        raise TokenizerError(f"the choices of the argument {argument!r} of the tool {name} are not a JSON list: {text}")
    return [choice.strip() if isinstance(choice, str) else choice for choice in choices]
