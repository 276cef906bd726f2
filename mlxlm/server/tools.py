"""Tool calls: which tools a request offers, and how models write their calls."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from mlxlm.generation import Constraint, grammar
from mlxlm.generation.constraint import json_part
from mlxlm.generation.stopping import StopStrings
from mlxlm.server import fields as f
from mlxlm.server.fields import Fields
from mlxlm.server.problems import Problem
from mlxlm.tokenizers import Tokenizer

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Tools that the model may call.

    schemas: as chat templates take them; empty for none.  required: whether it must call one.
    """

    schemas: tuple[dict[str, Any], ...] = ()
    required: bool = False


def read_tools(fields: Fields) -> Tools:
    """`tools` and `tool_choice` of a request."""
    listed = fields.take("tools", f.items, [])
    choice = fields.take("tool_choice", f.anything, "auto" if listed else "none")
    fields.take("parallel_tool_calls", f.one_of(True))
    schemas = [_read_tool(one, f"tools[{number}]") for number, one in enumerate(listed)]
    names = [schema["function"]["name"] for schema in schemas]
    if len(set(names)) < len(names):
        raise Problem(400, "two tools have the same name", param="tools", code="invalid_value")
    if choice == "none":
        return Tools()
    if not schemas:
        raise Problem(400, "tool_choice needs tools", param="tool_choice")
    if choice == "auto":
        return Tools(schemas=tuple(schemas))
    if choice == "required":
        return Tools(schemas=tuple(schemas), required=True)
    named = Fields(choice, "tool_choice")
    named.need("type", f.one_of("function"))
    inner = Fields(named.need("function", f.mapping), "tool_choice.function")
    wanted = inner.need("name", f.one_of(*names))
    inner.done()
    named.done()
    return Tools(schemas=tuple(s for s in schemas if s["function"]["name"] == wanted), required=True)


def _read_tool(value: Any, where: str) -> dict[str, Any]:
    fields = Fields(value, where)
    fields.need("type", f.one_of("function"))
    inner = Fields(fields.need("function", f.mapping), f"{where}.function")
    name = inner.need("name", f.text)
    if not _NAME.fullmatch(name):
        raise f.wrong(f"{where}.function.name", name, "1 to 64 letters, digits, dots, dashes and underscores")
    description = inner.take("description", f.text)
    parameters = inner.take("parameters", f.mapping, {"type": "object", "properties": {}})
    # Calls are held to their schema where a call is required, whatever this says.
    inner.take("strict", f.flag)
    inner.done()
    fields.done()
    function = {"name": name, "description": description or "", "parameters": parameters}
    return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class ToolDialect:
    """How a model writes calls.

    begin, end: around one call, or around a list of calls; end is empty where the call ends with the answer. Without
    `begin` the answer as a whole is the call.  arguments: key of the arguments beside "name".
    """

    begin: str
    end: str
    arguments: str = "arguments"
    listed: bool = False

    def constraint(self, tokenizer: Tokenizer, tools: Tools) -> Constraint:
        """What an answer that is one call looks like."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": one["name"]}, self.arguments: one["parameters"]},
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for one in (schema["function"] for schema in tools.schemas)
        ]
        begin, end = (_mark(tokenizer, mark) for mark in (self.begin, self.end))
        around = ('"[" call "]"' if self.listed else "call").join([begin, end])
        part = json_part(calls[0] if len(calls) == 1 else {"anyOf": calls})
        return grammar(tokenizer, f"start: answer\nanswer: {around}\ncall: {part}", "schema of a tool")


def _mark(tokenizer: Tokenizer, mark: str) -> str:
    """A mark in a grammar: its token where that is special, else its text."""
    if not mark:
        return " "
    id = tokenizer.token_id(mark)
    return f" <[{id}]> " if id is not None and id in tokenizer.special_ids else f" {json.dumps(mark)} "


def dialect_of(tokenizer: Tokenizer) -> ToolDialect:
    """The dialect that a chat template writes and shows to the model.

    Raises Problem for a template that has no place for tools.
    """
    source = tokenizer.tool_template or ""
    if "tools" not in source:
        raise Problem(400, "the chat template of this model has no place for tools", param="tools", code="unsupported")
    if "<tool_call>" in source:
        return ToolDialect(begin="<tool_call>", end="</tool_call>")
    if "[TOOL_CALLS]" in source:
        return ToolDialect(begin="[TOOL_CALLS]", end="", listed=True)
    return ToolDialect(begin="", end="", arguments="parameters" if '"parameters"' in source else "arguments")


def shown(tokenizer: Tokenizer, dialect: ToolDialect | None) -> frozenset[int]:
    """Special tokens that are part of calls and so must not be left out of the text."""
    if dialect is None:
        return frozenset()
    ids = [tokenizer.token_id(mark) for mark in (dialect.begin, dialect.end) if mark]
    return frozenset(id for id in ids if id is not None)


@dataclass(frozen=True)
class Called:
    """A call.  number: from 0 in the answer.  body: as the protocol has it."""

    number: int
    body: dict[str, Any]


class ToolReader:
    """Tells tool calls from text while an answer comes in. What looks like a call and isn't one stays text."""

    def __init__(self, dialect: ToolDialect):
        self._dialect = dialect
        self._held = ""
        self._inside = not dialect.begin
        # Whether the rest is text, whatever it looks like.
        self._plain = False
        self.count = 0

    def add(self, text: str) -> tuple[str, list[Called]]:
        """Text that is no call, and calls that are whole now."""
        begin, end = self._dialect.begin, self._dialect.end
        self._held += text
        out, calls = "", []
        if not begin and self._held.lstrip()[:1] not in ("", "{", "["):
            self._plain = True
        while not self._plain:
            if not self._inside:
                passed, mark, rest = self._held.partition(begin)
                if not mark:
                    kept = StopStrings.beginning(self._held, begin)
                    passed, rest = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
                out, self._held, self._inside = out + passed, rest, bool(mark)
                if not mark:
                    return out, calls
            if not end or end not in self._held:
                return out, calls
            inner, _, self._held = self._held.partition(end)
            found = self._parse(inner)
            out += "" if found else begin + inner + end
            calls += found
            self._inside = False
        out, self._held = out + self._held, ""
        return out, calls

    def finish(self) -> tuple[str, list[Called]]:
        """What was held back."""
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        calls = self._parse(held)
        return ("" if calls else self._dialect.begin + held), calls

    def _parse(self, text: str) -> list[Called]:
        """The calls that a text is, empty when it is something else."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        listed = value if isinstance(value, list) else [value]
        calls = []
        for one in listed:
            given = one.get(self._dialect.arguments, one.get("arguments")) if isinstance(one, dict) else None
            if not isinstance(given, dict) or not isinstance(one.get("name"), str):
                return []
            function = {"name": one["name"], "arguments": json.dumps(given, ensure_ascii=False)}
            body = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            calls.append(Called(self.count + len(calls), body))
        self.count += len(calls)
        return calls
