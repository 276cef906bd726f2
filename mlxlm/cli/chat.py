"""`mlxlm chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from mlxlm.cli import answers, ways
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
from mlxlm.errors import DistributedError, MlxlmError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlxlm.distributed import Joined

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this"


_FLAGS = (*SYSTEM_FLAGS, *SAMPLING_FLAGS, *ENDING_FLAGS, *GUESSING_FLAGS, *CACHE_FLAGS, *LOADING_FLAGS)


@with_flags(_FLAGS)
def chat(model: opt.Model, max_tokens: opt.MaxTokens = 1024, mesh: opt.MeshFlag = None, **flags: Any) -> None:
    """Chat with an instruct model. What was said stays in the cache, so each turn only reads what is new."""
    from mlxlm.generation import Conversation

    given = given_of(flags)
    sampling, spec = answers.sampling(given), answers.cache_spec(given)
    with opt.joined(mesh, axes=("tp", "pp")) as group:
        if not group.alone:
            ways.check_shared(given)
        start = time.perf_counter()
        network, tokenizer = answers.load(model, given, group)
        if tokenizer.chat_template is None:
            raise UnsupportedModelError(
                "this model has no chat template, so it can't chat; mlxlm generate continues text"
            )
        answer_options = answers.options(tokenizer, given, max_tokens, answers.alike(sampling, group))
        conversation = Conversation(network, tokenizer, given.get("system_prompt"), spec)

        def tell(said: str) -> None:
            if group.first:
                print(said, file=sys.stderr)

        tell(f"loaded in {time.perf_counter() - start:.2f} s; {_HELP}")
        while (text := _next(group)) is not None:
            if text in ("/exit", "/quit"):
                break
            if text == "/reset":
                conversation.reset()
                tell("the conversation is forgotten")
            elif text == "/help":
                tell(_HELP)
            elif text.startswith("/"):
                tell(f"unknown command {text.split()[0]}; {_HELP}")
            elif text:
                _answer(conversation, text, answer_options, group, tell)


def _next(group: Joined) -> str | None:
    """The next line that a person gives the first process, in all of them."""
    return group.world.share(_read() if group.first else None, "what is said next", limited=False)


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


def _answer(
    conversation: object, text: str, answer_options: dict[str, object], group: Joined, tell: Callable[[str], None]
) -> None:
    piece = None
    try:
        for piece in conversation.ask(text, **answer_options):  # type: ignore[attr-defined]
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        if not group.alone:
            raise  # processes that stopped at different words could not go on together
    except DistributedError:
        raise
    except MlxlmError as error:
        # A turn that can't be answered (a full context, say) ends neither the program nor the conversation.
        tell(f"error: {error}; /reset starts anew")
    if piece is not None:
        print(flush=True)
    if group.first:
        opt.report(piece, 0)
