"""`mlxlm cache-prompt`: read a long text once, for later prompts that begin with it."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from mlxlm.cli import caching
from mlxlm.cli import options as opt
from mlxlm.errors import PromptError


def cache_prompt(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text; - reads it from standard input.")],
    prompt_cache_file: Annotated[
        str, typer.Option("--prompt-cache-file", metavar="FILE", help="The .safetensors file to write.")
    ],
    model: opt.ModelOrShipped = None,
    system_prompt: opt.SystemPrompt = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="The text is no beginning of a chat message.")
    ] = False,
    kv_bits: caching.KvBits = None,
    kv_group_size: caching.KvGroupSize = None,
    max_kv_size: caching.MaxKvSize = None,
    adapter_path: opt.AdapterPath = None,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
) -> None:
    """Read a text and keep what the model made of it, for mlxlm generate --prompt-cache-file.

    The text is the beginning of a chat message where the model has a chat template. The file serves the same model,
    adapter and tokenizer only.
    """
    from mlxlm.generation import make_prompt_cache, save_prompt_cache

    spec = caching.cache_spec(kv_bits, kv_group_size, max_kv_size)
    text = (sys.stdin.read() if sys.stdin is not None else "") if prompt == "-" else prompt
    if not text:
        raise PromptError("the text to cache is empty; give one with --prompt")
    network, tokenizer = opt.load(model or opt.shipped_model(), dtype, revision, adapter_path)
    start = time.perf_counter()
    made = make_prompt_cache(
        network, tokenizer, text, spec=spec, chat=False if ignore_chat_template else None, system=system_prompt
    )
    seconds = time.perf_counter() - start
    save_prompt_cache(prompt_cache_file, network, tokenizer, made)
    print(
        f"{len(made.tokens)} tokens in {seconds:.2f} s; {made.cache.nbytes / 1e6:.1f} MB of cache, {prompt_cache_file}",
        file=sys.stderr,
    )
