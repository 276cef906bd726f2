"""What answers must look like: `response_format` of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlxlm.generation import Processor
from mlxlm.server import fields as f
from mlxlm.server.fields import Fields
from mlxlm.server.problems import Problem
from mlxlm.tokenizers import Tokenizer


def constraint(tokenizer: Tokenizer, form: Mapping[str, Any] | None) -> Callable[[], tuple[Processor, ...]]:
    """What makes the processors of one answer of that form."""
    if form is None:
        return tuple
    fields = Fields(form, "response_format")
    if fields.need("type", f.one_of("text", "json_object", "json_schema")) != "text":
        raise Problem(400, "this server does not constrain answers", param="response_format", code="unsupported_field")
    fields.done()
    return tuple
