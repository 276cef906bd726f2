"""/v1/chat/completions: messages to be answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlxlm.errors import MlxlmError
from mlxlm.server import fields as f
from mlxlm.server.answering import AnswerPiece
from mlxlm.server.asking import REFUSED, Asked, check_prompts, read_options
from mlxlm.server.constraints import constraint
from mlxlm.server.fields import Fields
from mlxlm.server.problems import Problem
from mlxlm.server.settings import ServerSettings
from mlxlm.server.tools import Called, ToolDialect, ToolReader, Tools, dialect_of, read_tools
from mlxlm.server.wire import clamp
from mlxlm.tokenizers import Tokenizer

# Variables of a template that are ours to set.
_RESERVED = ("messages", "tools", "add_generation_prompt", "chat_template", "tokenize")


def read_chat(
    body: Any, tokenizer: Tokenizer, settings: ServerSettings, words: int
) -> tuple[Asked, ToolDialect | None]:
    """What a request asks for, and how the model writes the tool calls that it may make.

    words: to choose from.

    Raises Problem for a request that can't be answered as it is.
    """
    fields = Fields(body)
    fields.take("model", f.text)
    messages = fields.need("messages", _read_messages)
    options = read_options(fields, settings, settings.max_tokens)
    logprobs = fields.take("logprobs", f.flag, False)
    top = fields.take("top_logprobs", f.whole(0, 20))
    if top is not None and not logprobs:
        raise Problem(400, "top_logprobs goes with logprobs=true only", param="top_logprobs")
    tools = read_tools(fields)
    form = fields.take("response_format", f.mapping)
    variables = fields.take("chat_template_kwargs", _read_variables, {})
    fields.done(REFUSED)
    if tools.required and form not in (None, {"type": "text"}):
        raise Problem(400, "response_format does not go with a tool call that is required", param="response_format")
    dialect = dialect_of(tokenizer) if tools.schemas else None
    if dialect is not None and tools.required:
        made = dialect.constraint(tokenizer, tools)
    else:
        made = constraint(tokenizer, form)
    options = replace(options, likelihoods=(top or 0) if logprobs else None)
    tokens = tuple(_encode(tokenizer, messages, tools, variables))
    check_prompts([tokens], options.copies, settings)
    stops = tokenizer.stop_ids
    return Asked(prompts=(tokens,), options=options, stop_tokens=stops, words=words, constraint=made), dialect


def _encode(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Tools, variables: dict[str, Any]) -> list[int]:
    try:
        return tokenizer.encode_chat(messages, tools=tools.schemas or None, add_generation_prompt=True, **variables)
    except MlxlmError as error:
        raise Problem(400, str(error), param="messages", code="invalid_messages") from None


def _read_variables(name: str, value: Any) -> dict[str, Any]:
    for reserved in _RESERVED:
        if reserved in f.mapping(name, value):
            raise Problem(400, f"{name}.{reserved} can't be set", param=f"{name}.{reserved}")
    return dict(value)


def _read_messages(name: str, value: Any) -> list[dict[str, Any]]:
    found = [_read_message(one, f"{name}[{number}]") for number, one in enumerate(f.items(name, value))]
    if not found:
        raise Problem(400, "messages is empty: a chat needs at least one", param=name, code="invalid_value")
    return found


def _read_message(value: Any, where: str) -> dict[str, Any]:
    """A message as chat templates take it."""
    fields = Fields(value, where)
    role = fields.need("role", f.one_of("system", "developer", "user", "assistant", "tool"))
    content = fields.take("content", _read_content)
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if (name := fields.take("name", f.text)) is not None:
        message["name"] = name
    if role == "assistant":
        calls = fields.take("tool_calls", f.items)
        if calls:
            message["tool_calls"] = [_read_call(one, f"{where}.tool_calls[{i}]") for i, one in enumerate(calls)]
        # What we have sent ourselves comes back with these.
        for sent in ("refusal", "annotations", "audio", "function_call"):
            fields.take(sent, f.one_of([]))
    if role == "tool":
        message["tool_call_id"] = fields.need("tool_call_id", f.text)
    fields.done()
    if content is None and "tool_calls" not in message:
        raise Problem(400, f"{where}.content is missing", param=f"{where}.content", code="missing_field")
    # Templates add text to the content, also where there is none.
    message["content"] = content or ""
    return message


def _read_content(name: str, value: Any) -> str:
    """Text, also in parts."""
    if isinstance(value, str):
        return value
    parts = []
    for number, part in enumerate(f.items(name, value)):
        fields = Fields(part, f"{name}[{number}]")
        kind = fields.need("type", f.text)
        if kind != "text":
            raise Problem(400, f"{name}[{number}] is of type {kind!r:.40}, but this server takes text only", param=name)
        parts.append(fields.need("text", f.text))
        fields.done()
    return "".join(parts)


def _read_call(value: Any, where: str) -> dict[str, Any]:
    """A tool call of an earlier answer. Its arguments are JSON in text here and an object in templates."""
    fields = Fields(value, where)
    identity = fields.need("id", f.text)
    fields.take("type", f.one_of("function"))
    fields.take("index", f.anything)
    inner = Fields(fields.need("function", f.mapping), f"{where}.function")
    name, arguments = inner.need("name", f.text), inner.need("arguments", f.text)
    inner.done()
    fields.done()
    try:
        given = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, Mapping):
        raise Problem(400, f"{where}.function.arguments is not a JSON object in text", param=where)
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": given}}


class ChatForm:
    """Answers to /v1/chat/completions as JSON."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, asked: Asked, tokenizer: Tokenizer, dialect: ToolDialect | None):
        self._tokenizer = tokenizer
        self._wants = asked.options.likelihoods
        self._readers = [None if dialect is None else ToolReader(dialect) for _ in range(asked.options.copies)]

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first choice of a stream: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _read(self, piece: AnswerPiece) -> tuple[str, list[Called], str | None]:
        """Text and tool calls of a piece, and why the answer ends."""
        reader = self._readers[piece.index]
        if reader is None:
            return piece.text, [], piece.finish_reason
        text, calls = reader.add(piece.text)
        reason = piece.finish_reason
        if reason is not None:
            more, last = reader.finish()
            text, calls = text + more, calls + last
            if reader.count and reason == "stop":
                reason = "tool_calls"
        return text, calls, reason

    def part(self, piece: AnswerPiece) -> dict[str, Any] | None:
        """A piece as a choice of a chunk, None for one that says nothing."""
        text, calls, reason = self._read(piece)
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": call.number, **call.body} for call in calls]
        if not delta and reason is None and self._wants is None:
            return None
        return {"index": piece.index, "delta": delta, "logprobs": self._logprobs([piece]), "finish_reason": reason}

    def whole(self, index: int, pieces: list[AnswerPiece]) -> dict[str, Any]:
        """All pieces of an answer as a choice."""
        read = [self._read(piece) for piece in pieces]
        content = "".join(text for text, _, _ in read)
        calls = [call.body for _, called, _ in read for call in called]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message.update(content=content.strip() or None, tool_calls=calls)
        return {"index": index, "message": message, "logprobs": self._logprobs(pieces), "finish_reason": read[-1][2]}

    def _logprobs(self, pieces: list[AnswerPiece]) -> dict[str, Any] | None:
        if self._wants is None:
            return None
        content = [
            {
                **self._token(choice.token, choice.log_probability),
                "top_logprobs": [self._token(id, value) for id, value in choice.likeliest],
            }
            for piece in pieces
            for choice in piece.choices
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float | None) -> dict[str, Any]:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        # Part of a character has no text of its own, and no bytes that could be told from it.
        known = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "bytes": known, "logprob": clamp(value)}
