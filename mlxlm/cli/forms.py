"""Flags that say what an answer must look like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlm.errors import UsageError

if TYPE_CHECKING:
    from mlxlm.generation import Constraint
    from mlxlm.tokenizers import Tokenizer

JsonSchema = Annotated[
    str | None,
    typer.Option("--json-schema", metavar="FILE|JSON", help="Answer in JSON of this schema: a file, or the schema."),
]
Regex = Annotated[
    str | None, typer.Option("--regex", help="Answer with a text that matches this regular expression as a whole.")
]


def read_schema(json_schema: str | None, regex: str | None, *, clash: bool) -> str | None:
    """The text of the schema, None without one. Raises UsageError for two forms, and for flags that clash with them."""
    if json_schema is not None and regex is not None:
        raise UsageError("give either --json-schema or --regex, not both")
    if clash and (json_schema is not None or regex is not None):
        raise UsageError("--json-schema and --regex go with no beam search and no guessing ahead")
    if json_schema is None or json_schema.lstrip().startswith("{"):
        return json_schema
    try:
        return Path(json_schema).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--json-schema is a JSON object or a file, and {json_schema!r:.100} can't be read: {reason}"
        ) from None


def constraint(tokenizer: Tokenizer, schema: str | None, pattern: str | None) -> Constraint | None:
    """What the answer must look like, None for anything."""
    from mlxlm.generation import json_schema, regex

    if schema is not None:
        return json_schema(tokenizer, schema)
    return None if pattern is None else regex(tokenizer, pattern)
