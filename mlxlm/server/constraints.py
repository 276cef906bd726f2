"""What answers must look like: `response_format` of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxlm.generation import Constraint, json_schema, regex
from mlxlm.server import fields as f
from mlxlm.server.fields import Fields
from mlxlm.tokenizers import Tokenizer

# Characters of a regular expression: grammars cost time that grows with them.
_LONGEST = 16_384


def constraint(tokenizer: Tokenizer, form: Mapping[str, Any] | None) -> Constraint | None:
    """What answers of that form must look like: text, json_object, json_schema, or (ours) regex.

    Raises UsageError for a schema that can't be kept to.
    """
    if form is None:
        return None
    fields = Fields(form, "response_format")
    kind = fields.need("type", f.one_of("text", "json_object", "json_schema", "regex"))
    made: Constraint | None = None
    if kind == "json_object":
        made = json_schema(tokenizer, {"type": "object"})
    elif kind == "regex":
        pattern = fields.need("pattern", f.text)
        if len(pattern) > _LONGEST:
            raise f.wrong("response_format.pattern", pattern, f"at most {_LONGEST} characters")
        made = regex(tokenizer, pattern)
    elif kind == "json_schema":
        inner = Fields(fields.need("json_schema", f.mapping), "response_format.json_schema")
        for name in ("name", "description"):
            inner.take(name, f.text)
        # Answers are held to the schema in any case.
        inner.take("strict", f.flag)
        made = json_schema(tokenizer, inner.take("schema", f.mapping, {}))
        inner.done()
    fields.done()
    return made
