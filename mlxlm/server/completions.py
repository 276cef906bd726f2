"""/v1/completions: texts to be continued."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxlm.server import fields as f
from mlxlm.server.answering import AnswerPiece
from mlxlm.server.asking import REFUSED, Asked, check_prompts, read_options
from mlxlm.server.constraints import constraint
from mlxlm.server.fields import Fields
from mlxlm.server.problems import Problem
from mlxlm.server.settings import ServerSettings
from mlxlm.server.wire import clamp
from mlxlm.tokenizers import Tokenizer

# What the protocol takes where nothing is said.
_DEFAULT_TOKENS = 16


def read_completion(body: Any, tokenizer: Tokenizer, settings: ServerSettings, words: int) -> Asked:
    """What a request asks for.  words: to choose from. Raises Problem for one that can't be answered as it is."""
    fields = Fields(body)
    fields.take("model", f.text)
    prompts = fields.need("prompt", _read_prompts)
    options = read_options(fields, settings, _DEFAULT_TOKENS)
    options = replace(options, likelihoods=fields.take("logprobs", f.whole(0, 5)))
    fields.take("best_of", f.one_of(options.copies))
    form = constraint(tokenizer, fields.take("response_format", f.mapping))
    fields.done(REFUSED)
    tokens = tuple(tuple(tokenizer.encode(one) if isinstance(one, str) else one) for one in prompts)
    check_prompts(tokens, options.copies, settings)
    return Asked(prompts=tokens, options=options, stop_tokens=tokenizer.stop_ids, words=words, constraint=form)


def _read_prompts(name: str, value: Any) -> list[Any]:
    """Prompts as a list of texts or of lists of ids."""
    listed = value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        listed = [value]
    for one in listed:
        ids = isinstance(one, list) and one and all(type(token) is int for token in one)
        if not (ids or (isinstance(one, str) and one)):
            raise f.wrong(name, value, "text that is not empty, a list of token ids, or a list of these")
    if not listed:
        raise Problem(400, "prompt is an empty list", param=name, code="invalid_value")
    return listed


class CompletionForm:
    """Answers to /v1/completions as JSON."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, asked: Asked, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._wants = asked.options.likelihoods
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first choice of a stream, None as there is none."""
        return None

    def part(self, piece: AnswerPiece) -> dict[str, Any] | None:
        """A piece as a choice of a chunk, None for one that says nothing."""
        if not piece.text and piece.finish_reason is None and self._wants is None:
            return None
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def whole(self, index: int, pieces: list[AnswerPiece]) -> dict[str, Any]:
        """All pieces of an answer as a choice."""
        text = "".join(piece.text for piece in pieces)
        choices = [choice for piece in pieces for choice in piece.choices]
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(AnswerPiece(index, text, choices, None)),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, piece: AnswerPiece) -> dict[str, Any] | None:
        if self._wants is None:
            return None
        tokens = [self._tokenizer.decode([choice.token], skip_special_tokens=False) for choice in piece.choices]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.setdefault(piece.index, 0))
            self._offsets[piece.index] += len(token)
        tops = [
            {self._tokenizer.decode([id], skip_special_tokens=False): clamp(value) for id, value in choice.likeliest}
            for choice in piece.choices
        ]
        return {
            "tokens": tokens,
            "token_logprobs": [clamp(choice.log_probability) for choice in piece.choices],
            "top_logprobs": tops if self._wants else None,
            "text_offset": offsets,
        }
