"""`mlxlm chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from mlxlm.cli import answers
from mlxlm.cli import options as opt
from mlxlm.cli.answer_flags import (
    CACHE_FLAGS,
    ENDING_FLAGS,
    GUESSING_FLAGS,
    LOADING_FLAGS,
    SAMPLING_FLAGS,
    SYSTEM_FLAGS,
)
from mlxlm.cli.flags import given_of, with_flags
from mlxlm.errors import MlxlmError, UnsupportedModelError

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this"


_FLAGS = (*SYSTEM_FLAGS, *SAMPLING_FLAGS, *ENDING_FLAGS, *GUESSING_FLAGS, *CACHE_FLAGS, *LOADING_FLAGS)


@with_flags(_FLAGS)
def chat(model: opt.Model, max_tokens: opt.MaxTokens = 1024, **flags: Any) -> None:
    """Chat with an instruct model. What was said stays in the cache, so each turn only reads what is new."""
    from mlxlm.generation import Conversation

    given = given_of(flags)
    sampling, spec = answers.sampling(given), answers.cache_spec(given)
    start = time.perf_counter()
    network, tokenizer = answers.load(model, given)
    if tokenizer.chat_template is None:
        raise UnsupportedModelError("this model has no chat template, so it can't chat; mlxlm generate continues text")
    answer_options = answers.options(tokenizer, given, max_tokens, sampling)
    conversation = Conversation(network, tokenizer, given.get("system_prompt"), spec)
    print(f"loaded in {time.perf_counter() - start:.2f} s; {_HELP}", file=sys.stderr)
    while (text := _read()) is not None:
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            conversation.reset()
            print("the conversation is forgotten", file=sys.stderr)
        elif text == "/help":
            print(_HELP, file=sys.stderr)
        elif text.startswith("/"):
            print(f"unknown command {text.split()[0]}; {_HELP}", file=sys.stderr)
        elif text:
            _answer(conversation, text, answer_options)


def _read() -> str | None:
    """The next line without surrounding blanks, "" for an abandoned one, None at the end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives input() editing and history
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(f"\n{_HELP}", file=sys.stderr)
        return ""


def _answer(conversation: object, text: str, answer_options: dict[str, object]) -> None:
    piece = None
    try:
        for piece in conversation.ask(text, **answer_options):  # type: ignore[attr-defined]
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except MlxlmError as error:
        # A turn that can't be answered (a full context, say) ends neither the program nor the conversation.
        print(f"error: {error}; /reset starts anew", file=sys.stderr)
    if piece is not None:
        print(flush=True)
    opt.report(piece, 0)
