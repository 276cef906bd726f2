"""Special and added tokens: what the files beside a vocabulary say about them.

Hugging Face checkpoints spread this over tokenizer_config.json (with `added_tokens_decoder`), and in older ones
special_tokens_map.json and added_tokens.json; generation_config.json and config.json know ids that end an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxlm.errors import TokenizerError

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

# Tokens that close one turn of a chat in the published templates. One of them ends an answer when the chat template
# writes it and the vocabulary has it as an added token.
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<turn|>",
    "<|eot|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
)

# Newer configs write "no limit" as a huge float.
_NO_LIMIT = 10**15


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is cut out of the text before the vocabulary sees it.

    content: its text.  special: left out by `decode(skip_special_tokens=True)`.  id: where the files say it stands,
    None when it takes the next free id.  lstrip, rstrip: it swallows white space on that side.  single_word: it only
    counts between non-word characters.  normalized: it is looked for in the normalized text.
    """

    content: str
    special: bool = True
    id: int | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @classmethod
    def parse(cls, value: Any, where: str, *, special: bool = True, id: int | None = None) -> AddedToken:
        """From a string or from a dict with a "content" key, as the configs write it."""
        if isinstance(value, str):
            return cls(content=value, special=special, id=id)
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            flags = {name: bool(value[name]) for name in _FLAGS if name in value}
            return cls(content=value["content"], id=id, **{"special": special, **flags})
        raise TokenizerError(f"{where}: expected a string or an object with 'content', got {value!r}")


_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(kw_only=True)
class Settings:
    """Everything about a tokenizer that is not its vocabulary.

    config: tokenizer_config.json.  named: role ("bos", "eos", ...) -> token text.  added: added tokens, those with an
    id first, in its order.  templates: chat templates by name.  end_ids: further ids that end an answer.
    generation: generation_config.json.
    """

    config: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()
    templates: dict[str, str] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer_class(self) -> str | None:
        """The class that the files name, without "Fast"; None for the generic classes, which say nothing."""
        name = str(self.config.get("tokenizer_class") or "").removesuffix("Fast")
        return None if name in ("", "PreTrainedTokenizer", "TokenizersBackend") else name

    @property
    def model_max_length(self) -> int | None:
        """The longest input in tokens that the files state, None for no limit."""
        value = self.config.get("model_max_length")
        return int(value) if isinstance(value, (int, float)) and 0 < value < _NO_LIMIT else None

    def flag(self, name: str) -> bool | None:
        """A boolean of tokenizer_config.json; None when absent or null."""
        value = self.config.get(name)
        return None if value is None else bool(value)

    def special_contents(self) -> set[str]:
        """Texts of all special tokens that the files name."""
        return {*self.named.values(), *(token.content for token in self.added if token.special)}


def read_json(path: Path) -> Any:
    """The content of a JSON file; TokenizerError with the place when it is not readable JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        problem = "is empty" if error.doc.strip() == "" else f"not valid JSON (line {error.lineno}: {error.msg})"
        raise TokenizerError(f"{path}: {problem}") from None
    except RecursionError:
        raise TokenizerError(f"{path}: not valid JSON (nested too deeply)") from None
    except OSError as error:
        raise TokenizerError(f"{path}: can't be read ({error.strerror or error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object; {} when there is no such file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_settings(directory: Path) -> Settings:
    """Settings from the files of a checkpoint directory; every file is optional."""
    config = read_object(directory / "tokenizer_config.json")
    model_config = read_object(directory / "config.json")
    if not config.get("tokenizer_class") and model_config.get("tokenizer_class"):
        config["tokenizer_class"] = model_config["tokenizer_class"]
    generation = read_object(directory / "generation_config.json")
    special_map, added_ids = {}, {}
    if "added_tokens_decoder" not in config:  # the newer file repeats what the two older ones said
        special_map = read_object(directory / "special_tokens_map.json")
        added_ids = read_object(directory / "added_tokens.json")
    named = _named_tokens({**special_map, **{key: value for key, value in config.items() if value is not None}})
    return Settings(
        config=config,
        named=named,
        added=tuple(_added_tokens(directory, config, special_map, added_ids, set(named.values()))),
        end_ids=tuple(_end_ids(directory, generation)),
        generation=generation,
    )


def fallback_ids(directory: Path) -> dict[str, int]:
    """Ids of bos, eos and pad from generation_config.json or config.json: for directories that name no tokens."""
    ids: dict[str, int] = {}
    for name in ("generation_config.json", "config.json"):
        config = read_object(directory / name)
        for role in ("bos", "eos", "pad"):
            value = config.get(f"{role}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and value >= 0:
                ids.setdefault(role, value)
    return ids


def _named_tokens(source: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for role in ROLES:
        value = source.get(f"{role}_token")
        if value:
            named[role] = AddedToken.parse(value, f"{role}_token").content
    return {role: content for role, content in named.items() if content}


def _added_tokens(
    directory: Path,
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
    added_ids: Mapping[str, Any],
    named: set[str],
) -> Iterable[AddedToken]:
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{directory / 'tokenizer_config.json'}: added_tokens_decoder must be an object")
    placed = []
    for key, value in decoder.items():
        if not key.isdecimal():
            raise TokenizerError(f"{directory / 'tokenizer_config.json'}: added_tokens_decoder has the id {key!r}")
        placed.append(AddedToken.parse(value, f"added_tokens_decoder[{key}]", special=False, id=int(key)))
    extra = [
        AddedToken.parse(value, "additional_special_tokens")
        for source in (config, special_map)
        for value in _extra_specials(source)
    ]
    specials = named | {token.content for token in extra}
    for content, id in added_ids.items():
        if not isinstance(id, int) or id < 0:
            raise TokenizerError(f"{directory / 'added_tokens.json'}: {content!r} has the id {id!r}")
        placed.append(
            AddedToken(content=content, special=content in specials, id=id, normalized=content not in specials)
        )
    seen = set()
    for token in [*sorted(placed, key=lambda token: token.id or 0), *extra]:
        if token.content and token.content not in seen:
            seen.add(token.content)
            yield token


def _extra_specials(source: Mapping[str, Any]) -> list[Any]:
    value = source.get("additional_special_tokens") or source.get("extra_special_tokens") or []
    return list(value.values()) if isinstance(value, dict) else list(value)


def _end_ids(directory: Path, generation: Mapping[str, Any]) -> Iterable[int]:
    value = generation.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    for id in values:
        if not isinstance(id, int) or id < 0:
            raise TokenizerError(f"{directory / 'generation_config.json'}: eos_token_id has {id!r}, expected ids")
        yield id
