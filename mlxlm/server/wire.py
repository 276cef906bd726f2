"""Answers on the wire: objects, chunks and server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

from mlxlm.server.answering import AnswerPiece, Answers
from mlxlm.server.asking import Asked
from mlxlm.server.problems import Problem


class Form(Protocol):
    """How answers of one endpoint look."""

    kind: str
    chunk_kind: str
    prefix: str

    def opening(self, index: int) -> dict[str, Any] | None: ...

    def part(self, piece: AnswerPiece) -> dict[str, Any] | None: ...

    def whole(self, index: int, pieces: list[AnswerPiece]) -> dict[str, Any]: ...


def clamp(value: float | None) -> float:
    """A log probability as JSON has it: no infinities."""
    return max(value or 0.0, -9999.0)


def usage(asked: Asked, answers: Answers) -> dict[str, int]:
    """Tokens that were read and made; a prompt with several answers counts once."""
    read = sum(map(len, asked.prompts))
    made = answers.generated_tokens
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def envelope(form: Form, kind: str, model: str) -> dict[str, Any]:
    """What stands around choices."""
    identity = f"{form.prefix}-{uuid.uuid4().hex}"
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}


async def whole(form: Form, asked: Asked, answers: Answers, model: str) -> dict[str, Any]:
    """All answers, when they are made."""
    count = len(asked.prompts) * asked.options.copies
    pieces: list[list[AnswerPiece]] = [[] for _ in range(count)]
    async for piece in answers.pieces():
        pieces[piece.index].append(piece)
    choices = [form.whole(index, own) for index, own in enumerate(pieces)]
    return {**envelope(form, form.kind, model), "choices": choices, "usage": usage(asked, answers)}


def event(body: Any) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(body, allow_nan=False)}\n\n".encode()


async def events(form: Form, asked: Asked, answers: Answers, model: str) -> AsyncIterator[bytes]:
    """All answers as server-sent events, while they are made. What goes wrong on the way is the last event."""
    around = envelope(form, form.chunk_kind, model)
    counted = {"usage": None} if asked.options.usage else {}
    for index in range(len(asked.prompts) * asked.options.copies):
        if (choice := form.opening(index)) is not None:
            yield event({**around, "choices": [choice], **counted})
    try:
        async for piece in answers.pieces():
            if (choice := form.part(piece)) is not None:
                yield event({**around, "choices": [choice], **counted})
    except Problem as problem:
        yield event(problem.body)
        return
    if asked.options.usage:
        yield event({**around, "choices": [], "usage": usage(asked, answers)})
    yield b"data: [DONE]\n\n"
