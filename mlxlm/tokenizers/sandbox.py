"""Rendering of chat templates, which come with a model and are the code of strangers.

They run in Jinja's sandbox, on plain data only, and with limits on what one value and the whole output may weigh.
The running time of a template's loops is not limited.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mlxlm.errors import TokenizerError

# Characters of the whole output, and characters or items of any value on the way to it.
MAX_OUTPUT = 16_000_000
_MAX_NUMBER_BITS = 4096
_MAX_WIDTH = 10_000

# Methods of str and filters whose result is as large as a number among their arguments says.
_WIDE_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_WIDE_FILTERS = ("batch", "center", "indent", "round", "slice", "tojson", "wordwrap")

_DYNAMIC_WIDTH = re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*\{|\d{5,}")


class _RefusedMessages(TemplateError):
    """The template called raise_exception."""


class _GenerationBlock(Extension):
    """Accepts {% generation %} ... {% endgeneration %}, with which templates mark what the assistant wrote."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _BoundedCode(CodeGenerator):
    """Sends `a ~ b` through the environment's bounded join."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


def _bounded_join(parts: Iterable[str], separator: str = "") -> str:
    kept, total = [], 0
    for part in parts:
        total += len(part) + len(separator)
        _check_size(total)
        kept.append(part)
    return separator.join(kept)


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT:
        raise SecurityError(f"its output grows beyond {MAX_OUTPUT:,} characters")


def _check_widths(arguments: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_WIDTH for value in arguments):
        raise SecurityError(f"it asks for a text wider than {_MAX_WIDTH:,} characters")


def _check_format(pattern: str) -> None:
    if _DYNAMIC_WIDTH.search(pattern.replace("{{", "").replace("}}", "")):
        raise SecurityError(f"it formats text with the pattern {pattern[:40]!r}")


def _check_replaced(text: str, old: str, new: str) -> None:
    count = text.count(old) if old else len(text) + 1
    _check_size(len(text) + count * max(len(new) - len(old), 0))


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _BoundedCode
    concat = staticmethod(_bounded_join)  # type: ignore[assignment]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sequences = (str, list, tuple)
        if operator == "+" and isinstance(left, sequences) and isinstance(right, sequences):
            _check_size(len(left) + len(right))
        elif operator == "*" and isinstance(left, sequences) and isinstance(right, int):
            _check_size(len(left) * right)
        elif operator == "*" and isinstance(right, sequences) and isinstance(left, int):
            _check_size(len(right) * left)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_NUMBER_BITS:
                raise SecurityError("it makes a number grow too large")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format itself
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str):
            if name in _WIDE_METHODS:
                _check_widths((*args, *kwargs.values()))
            elif name in ("format", "format_map"):
                _check_format(text)
            elif name == "replace" and len(args) >= 2:
                _check_replaced(text, str(args[0]), str(args[1]))
            elif name == "join" and len(args) == 1:
                return _bounded_join(args[0], text)
        return super().call(__context, __obj, *args, **kwargs)


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the marks that say what Jinja passes as first argument
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _check_widths((*args[1:], *kwargs.values()))
        return function(*args, **kwargs)

    return filtered


@pass_environment
def _join_filter(environment: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return _bounded_join(map(str, value), str(d))


def _replace_filter(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    _check_replaced(str(value), str(old), str(new))
    return str(value).replace(str(old), str(new), -1 if count is None else count)


def _format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(value))
    return str(value) % (kwargs or args)


def _json_filter(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As json.dumps: other than Jinja's own filter it does not escape HTML and leaves non-ASCII text as it is."""
    separators = None if separators is None else tuple(separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dictionaries:
    """The global `dict`: calls and `fromkeys`, and no way to the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    values = dict(*args, **kwargs)
    for name in values:
        if str(name).startswith("_"):
            raise SecurityError(f"it gives a namespace the attribute {name!r}")
    return Namespace(values)


def _raise_exception(message: Any) -> None:
    raise _RefusedMessages(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(str(format))


@functools.lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    filters = {"tojson": _json_filter, "join": _join_filter, "replace": _replace_filter, "format": _format_filter}
    environment.filters.update(filters)
    for name in _WIDE_FILTERS:
        environment.filters[name] = _bounded_filter(environment.filters[name])
    del environment.globals["lipsum"]
    environment.globals.update(
        dict=_Dictionaries(), namespace=_namespace, raise_exception=_raise_exception, strftime_now=_now
    )
    return environment


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    _check_size(len(source))
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from None
    except Exception as error:  # limits of Python itself on the generated code: nesting, recursion
        raise TokenizerError(f"the chat template can't be compiled: {_describe(error)}") from None


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of these variables, of which it sees plain copies. Templates are compiled once.

    Raises TokenizerError when the template is malformed, fails, refuses the messages or writes too much.
    """
    try:
        template = _compile(source)
        return _bounded_join(template.generate({name: plain(value) for name, value in variables.items()}))
    except TokenizerError:
        raise
    except _RefusedMessages as error:
        raise TokenizerError(f"the chat template refuses these messages: {error.message}") from None
    except SecurityError as error:
        raise TokenizerError(f"the chat template was stopped: {error.message}") from None
    except Exception as error:  # whatever a stranger's code may raise on this data
        raise TokenizerError(f"the chat template fails on these messages: {_describe(error)}") from None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error) or 'no details'}".splitlines()[0]


def plain(value: Any) -> Any:
    """A copy made of plain JSON types only, so that a template can reach no methods but those of str, dict and list.

    Any other object becomes a text that names its type: templates only ask whether an image is there.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of numpy
        return plain(value.item())
    return f"<{type(value).__name__}>"
