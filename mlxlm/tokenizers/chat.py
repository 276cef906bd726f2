"""Chats as prompts: which template a tokenizer uses, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxlm.errors import TokenizerError, listing
from mlxlm.tokenizers.special_tokens import read_object

DEFAULT, TOOL_USE = "default", "tool_use"
FILE_NAME = "chat_template.jinja"
FOLDERS = ("additional_chat_templates", "chat_templates")

Message = Mapping[str, Any]
Tool = Mapping[str, Any] | Callable[..., Any]


def read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The named templates of a checkpoint directory; a single one is called "default".

    Sources, later ones winning: `chat_template` in tokenizer_config.json (text, object of name -> text, or list of
    objects with name and template), chat_template.json, chat_template.jinja, and <name>.jinja in the folder
    additional_chat_templates.
    """
    templates = _parse(config.get("chat_template"), "tokenizer_config.json")
    legacy = directory / "chat_template.json"
    templates |= _parse(read_object(legacy).get("chat_template"), legacy.name)
    if (directory / FILE_NAME).is_file():
        templates[DEFAULT] = _read(directory / FILE_NAME)
    for folder in FOLDERS:
        for path in sorted((directory / folder).glob("*.jinja")):
            templates[path.stem] = _read(path)
    return templates


def _parse(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) and "name" in entry for entry in value):
        value = {entry["name"]: entry.get("template") for entry in value}
    if isinstance(value, dict) and all(isinstance(source, str) for source in value.values()):
        return dict(value)
    raise TokenizerError(f"{where}: chat_template must be text, an object of name -> text, or a list of such objects")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise TokenizerError(f"{path}: can't be read ({error.strerror or error})") from None


def choose(templates: Mapping[str, str], wanted: str | None, has_tools: bool) -> str:
    """The source of the template to use.

    wanted: a name, or the source of a template itself; None for "tool_use" when there are tools and one of that name,
    else "default".
    """
    if wanted is not None:
        if "{" in wanted or wanted in templates:
            return templates.get(wanted, wanted)
        raise TokenizerError(f"there is no chat template {wanted!r}; this tokenizer has: {_names(templates)}")
    if has_tools and TOOL_USE in templates:
        return templates[TOOL_USE]
    if DEFAULT in templates:
        return templates[DEFAULT]
    if len(templates) == 1:
        return next(iter(templates.values()))
    if templates:
        raise TokenizerError(
            f"this tokenizer has several chat templates and no default: {_names(templates)}; choose one with "
            "chat_template=<name>"
        )
    raise TokenizerError(
        "this tokenizer has no chat template, so its model was probably not trained on chats; "
        "give it plain text, or a template with chat_template=<Jinja source>"
    )


def _names(templates: Mapping[str, str]) -> str:
    return listing(sorted(templates)) or "none"


def check_messages(messages: Any) -> list[Message]:
    """The messages as a list; TokenizerError when they are not objects with a role."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TokenizerError(
            f"messages must be a list of objects with 'role' and 'content', got {type(messages).__name__}"
        )
    if not messages:
        raise TokenizerError("messages is empty: a chat needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TokenizerError(f"message {index} must be an object with a 'role' that is text, got {message!r:.80}")
    return list(messages)


def describe_tools(tools: Sequence[Tool] | None) -> list[Mapping[str, Any]] | None:
    """JSON schemas of tools: objects stay, functions are described by their signature and docstring."""
    if tools is None:
        return None
    from mlxlm.tokenizers.tool_schemas import describe_function

    schemas: list[Mapping[str, Any]] = []
    for tool in tools:
        if not isinstance(tool, Mapping) and not callable(tool):
            raise TokenizerError(f"a tool must be a JSON schema (object) or a function, got {type(tool).__name__}")
        schemas.append(tool if isinstance(tool, Mapping) else describe_function(tool))
    return schemas


def render_chat(
    templates: Mapping[str, str],
    special_tokens: Mapping[str, str],
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None,
    add_generation_prompt: bool,
    chat_template: str | None = None,
    **variables: Any,
) -> str:
    """See `Tokenizer.render_chat`. special_tokens: roles -> texts."""
    from mlxlm.tokenizers.sandbox import render

    source = choose(templates, chat_template, bool(tools))
    known = {
        "documents": None,
        **{f"{role}_token": text for role, text in special_tokens.items()},
        **variables,
        "messages": check_messages(messages),
        "tools": describe_tools(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    return render(source, known)
