"""Flags that say what an answer must look like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlxlm.errors import UsageError

if TYPE_CHECKING:
    from mlxlm.generation import Constraint
    from mlxlm.tokenizers import Tokenizer


def read_schema(json_schema: str | None) -> str | None:
    """The text of the schema, None without one. Raises UsageError for a file that can't be read."""
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
