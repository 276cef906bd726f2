"""Writing a tokenizer as the files of a checkpoint directory.

A vocabulary of the `tokenizers` library becomes tokenizer.json, a SentencePiece model stays the model file that it was.
transformers rebuilds the latter with rules of its own: version 5 drops one space of a part that starts with one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxlm.errors import TokenizerError, listing
from mlxlm.tokenizers import chat
from mlxlm.tokenizers.backend import Backend
from mlxlm.tokenizers.loading import VOCABULARY_FILES
from mlxlm.tokenizers.special_tokens import Settings

_CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"
# These are always written anew or, when there is nothing to write, must not be left from another tokenizer.
_TEMPLATE_FILES = (chat.FILE_NAME, "chat_template.json")


def save(directory: Path, backend: Backend, settings: Settings, stop_ids: frozenset[int], eos_id: int | None) -> None:
    """Write vocabulary, tokenizer_config.json, chat templates and, if stop ids would be lost, generation_config.json.

    An existing generation_config.json is left alone: it belongs to the model. Files appear whole or not at all.
    """
    files = backend.files()
    files[_CONFIG] = _dump(_config(backend, settings))
    files |= _template_files(settings.templates)
    if stop_ids - {eos_id} and not (directory / _GENERATION).exists():
        ends = {"eos_token_id": sorted(stop_ids)}
        files[_GENERATION] = _dump({**settings.generation, **ends})
    others = {*VOCABULARY_FILES, *_TEMPLATE_FILES} - {*files}
    stale = sorted(name for name in others if (directory / name).exists())
    if stale:
        raise TokenizerError(
            f"{directory}: holds {listing(stale)} of another tokenizer, which would be read instead of or beside the "
            "one to be saved; remove it, or choose another directory"
        )
    for name, content in files.items():
        _write(directory / name, content)


def _config(backend: Backend, settings: Settings) -> dict[str, Any]:
    dropped = ("chat_template", "additional_special_tokens", "extra_special_tokens", "auto_map", "added_tokens_decoder")
    config = {key: value for key, value in settings.config.items() if key not in dropped}
    config.update({f"{role}_token": content for role, content in settings.named.items()})
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    named = set(settings.named.values())
    others = [token.content for token in backend.added if token.special and token.content not in named]
    if others:
        config["additional_special_tokens"] = others
    config["added_tokens_decoder"] = {
        str(token.id): {key: value for key, value in asdict(token).items() if key != "id"} for token in backend.added
    }
    return config


def _template_files(templates: dict[str, str]) -> dict[str, bytes]:
    files = {}
    for name, source in templates.items():
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise TokenizerError(f"the chat template {name!r} has a name that can't be a file's")
        path = chat.FILE_NAME if name == chat.DEFAULT else f"{chat.FOLDERS[0]}/{name}.jinja"
        files[path] = source.encode("utf-8")
    return files


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, bring it to the disk, then give it its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TokenizerError(f"{path}: can't be written ({error.strerror or error})") from None
