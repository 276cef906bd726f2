"""`mlxlm fill-mask`: words for the masks in a text, or what fills its blanks."""

from __future__ import annotations

from typing import Annotated

import typer

from mlxlm.cli import options as opt
from mlxlm.errors import UsageError


def fill_mask(
    model: opt.Model,
    text: Annotated[str, typer.Argument(help="A text with [MASK] where a word is to be filled in.")],
    top_k: Annotated[int | None, typer.Option("--top-k", help="Words a mask, default 5.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-m", help="Most tokens of a blank, where the model fills blanks.")
    ] = None,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
) -> None:
    """Fill masks with a masked language model: score, word and filled text, tab-separated, best first.

    A model that fills blanks of any length ([MASK], [sMASK] and [gMASK]) prints what it puts into each, a line a
    blank, and then the whole text.
    """
    from mlxlm.generation import fill_blanks
    from mlxlm.generation import fill_mask as fill

    network, tokenizer = opt.load(model, dtype, revision)
    if network.config.fills_blanks:
        if top_k is not None:
            raise UsageError("--top-k is for models that fill in one word; this one fills blanks of any length")
        filled = fill_blanks(network, tokenizer, text, max_tokens=100 if max_tokens is None else max_tokens)
        print(*filled.blanks, filled.text, sep="\n")
        return
    if max_tokens is not None:
        raise UsageError("--max-tokens is for models that fill blanks of any length; this one fills in one word")
    for number, candidates in enumerate(fill(network, tokenizer, text, top_k=5 if top_k is None else top_k)):
        if number:
            print()
        for candidate in candidates:
            print(f"{candidate.score:.4f}\t{candidate.word}\t{candidate.text}")
