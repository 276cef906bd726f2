"""Options about caches and guessing ahead, which verbs that generate share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlxlm.cli import options as opt
from mlxlm.errors import UsageError

if TYPE_CHECKING:
    from mlxlm.generation import Speculation
    from mlxlm.layers import CacheSpec
    from mlxlm.tokenizers import Tokenizer

KvBits = Annotated[
    int | None, typer.Option("--kv-bits", help="Hold keys and values in 8 or 4 bits; default as they are.")
]
KvGroupSize = Annotated[
    int | None, typer.Option("--kv-group-size", help="Values that share a scale with --kv-bits: 32, 64 or 128; 64.")
]
MaxKvSize = Annotated[
    int | None,
    typer.Option("--max-kv-size", help="Tokens to remember: the first 4 and the last ones; default all of them."),
]
PromptCacheFile = Annotated[
    str | None,
    typer.Option(
        "--prompt-cache-file", metavar="FILE", help="A file of mlxlm cache-prompt; --prompt continues its text."
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model", metavar="PATH_OR_ID", help="A smaller model with the same tokenizer that guesses ahead."
    ),
]
NumDraftTokens = Annotated[int | None, typer.Option("--num-draft-tokens", help="Tokens to guess at once; default 3.")]
PromptLookup = Annotated[
    int | None,
    typer.Option("--prompt-lookup", help="Guess what followed the last N tokens (or fewer) earlier in the text."),
]
EarlyExit = Annotated[
    int | None, typer.Option("--early-exit", help="Guess with the first N layers of the model itself.")
]


def cache_spec(bits: int | None, group_size: int | None, max_length: int | None) -> CacheSpec | None:
    """The cache that the flags ask for, None without any. Raises UsageError for numbers that don't go."""
    from mlxlm.layers import CacheSpec

    if group_size is not None and bits is None:
        raise UsageError("--kv-group-size is about quantized caches: give --kv-bits too")
    if bits is None and max_length is None:
        return None
    return CacheSpec(bits=bits, group_size=64 if group_size is None else group_size, max_length=max_length)


def speculation(
    tokenizer: Tokenizer,
    draft_model: str | None,
    count: int | None,
    prompt_lookup: int | None,
    early_exit: int | None,
    dtype: str | None,
) -> Speculation | None:
    """The guessing that the flags ask for, None without any. Loads the draft model.

    Raises UsageError for flags that contradict each other and for a draft model of another tokenizer.
    """
    from mlxlm.generation.speculation import Speculation, check_same_tokens

    ways = {"--draft-model": draft_model, "--prompt-lookup": prompt_lookup, "--early-exit": early_exit}
    given = [flag for flag, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are ways to guess ahead: give one of them")
    if not given:
        if count is not None:
            raise UsageError(f"--num-draft-tokens needs a way to guess ahead: {', '.join(ways)}")
        return None
    draft = None
    if draft_model is not None:
        draft, other = opt.load(draft_model, dtype, None)
        check_same_tokens(tokenizer, other)
    return Speculation(
        draft_model=draft,
        prompt_lookup=prompt_lookup,
        early_exit=early_exit,
        num_draft_tokens=3 if count is None else count,
    )
