"""`mlxlm cache-prompt`: read a long text once, for later prompts that begin with it."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from mlxlm.cli import answers
from mlxlm.cli import options as opt
from mlxlm.cli.answer_flags import CACHE_FLAGS, LOADING_FLAGS, TEMPLATE_FLAGS
from mlxlm.cli.flags import given_of, with_flags
from mlxlm.errors import PromptError


@with_flags((*TEMPLATE_FLAGS, *CACHE_FLAGS, *LOADING_FLAGS))
def cache_prompt(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text; - reads it from standard input.")],
    prompt_cache_file: Annotated[
        str, typer.Option("--prompt-cache-file", metavar="FILE", help="The .safetensors file to write.")
    ],
    model: opt.ModelOrShipped = None,
    **flags: Any,
) -> None:
    """Read a text and keep what the model made of it, for mlxlm generate --prompt-cache-file.

    The text is the beginning of a chat message where the model has a chat template. The file serves the same model,
    adapter and tokenizer only.
    """
    from mlxlm.generation import make_prompt_cache, save_prompt_cache

    given = given_of(flags)
    spec = answers.cache_spec(given)
    text = opt.read_text(prompt)
    if not text:
        raise PromptError("the text to cache is empty; give one with --prompt")
    network, tokenizer = answers.load(model, given)
    start = time.perf_counter()
    chat = False if given.get("ignore_chat_template") else None
    made = make_prompt_cache(network, tokenizer, text, spec=spec, chat=chat, system=given.get("system_prompt"))
    seconds = time.perf_counter() - start
    save_prompt_cache(prompt_cache_file, network, tokenizer, made)
    print(
        f"{len(made.tokens)} tokens in {seconds:.2f} s; {made.cache.nbytes / 1e6:.1f} MB of cache, {prompt_cache_file}",
        file=sys.stderr,
    )
