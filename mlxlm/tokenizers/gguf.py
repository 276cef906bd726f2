"""Tokenizers from the metadata of a GGUF file (its keys `tokenizer.*`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlxlm.errors import TokenizerError, nearest
from mlxlm.tokenizers.backend import Backend
from mlxlm.tokenizers.model_proto import BPE, PieceType, write_model
from mlxlm.tokenizers.special_tokens import ROLES, AddedToken, Settings
from mlxlm.tokenizers.tokenizer_classes import WORD_PIECE_TOKENS
from mlxlm.tokenizers.vocabulary_files import byte_level, check_tokens, word_piece

# llama.cpp's key for "sep" is misspelt; files in the wild have it either way.
ID_KEYS = {
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
    "unk": ("unknown_token_id",),
    "sep": ("seperator_token_id", "separator_token_id"),
    "pad": ("padding_token_id",),
    "cls": ("cls_token_id",),
    "mask": ("mask_token_id",),
}
_END_KEYS = ("eot_token_id", "eom_token_id")
_PHANTOM_SPACE = "\u2581"


@dataclass(frozen=True)
class Metadata:
    """Typed access to the tokenizer keys; wrong types raise TokenizerError that names the key."""

    values: Mapping[str, Any]

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise TokenizerError(f"GGUF metadata {key}: expected text, got {type(value).__name__}")
        return value

    def integer(self, key: str) -> int | None:
        value = self.values.get(key)
        try:
            return None if value is None else int(value)
        except (TypeError, ValueError):
            raise TokenizerError(f"GGUF metadata {key}: expected a number, got {value!r}") from None

    def flag(self, key: str, default: bool) -> bool:
        value = self.integer(f"tokenizer.ggml.{key}")
        return default if value is None else bool(value)

    def numbers(self, key: str, count: int) -> list[Any] | None:
        """A list of `count` numbers, or None when the key is absent."""
        value = self.values.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        numbers = value.tolist() if hasattr(value, "tolist") else list(value)
        if len(numbers) != count:
            raise TokenizerError(
                f"GGUF metadata tokenizer.ggml.{key}: {len(numbers)} entries for {count} tokens; the file is damaged"
            )
        return numbers

    @cached_property
    def tokens(self) -> list[str]:
        if "tokenizer.ggml.tokens" not in self.values:
            raise TokenizerError("the GGUF file holds no vocabulary: no key tokenizer.ggml.tokens")
        return check_tokens(self.values["tokenizer.ggml.tokens"], "GGUF metadata tokenizer.ggml.tokens")

    @cached_property
    def types(self) -> list[int]:
        types = self.numbers("token_type", len(self.tokens))
        return [PieceType.NORMAL] * len(self.tokens) if types is None else [int(kind) for kind in types]

    def token_id(self, role: str) -> int | None:
        for key in ID_KEYS[role]:
            id = self.integer(f"tokenizer.ggml.{key}")
            if id is not None:
                if not 0 <= id < len(self.tokens):
                    raise TokenizerError(
                        f"GGUF metadata tokenizer.ggml.{key}: {id} is outside a vocabulary of {len(self.tokens)} tokens"
                    )
                return id
        return None

    def special(self, role: str) -> tuple[str, int] | None:
        """(text, id) of the token in this role."""
        id = self.token_id(role)
        return None if id is None else (self.tokens[id], id)

    def named(self) -> dict[str, str]:
        return {role: special[0] for role in ID_KEYS if (special := self.special(role)) is not None}

    def added(self) -> list[AddedToken]:
        """Control tokens, which are special, and user-defined ones, which are ordinary text kept whole."""
        kinds = {int(PieceType.CONTROL): True, int(PieceType.USER_DEFINED): False}
        return [
            AddedToken(content=token, special=kinds[kind], id=id)
            for id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in kinds
        ]


# A vocabulary, what tokenizer_config.json says of it, and the texts of its special tokens.
Built = tuple[Backend, dict[str, Any], dict[str, str]]


def read_gguf(metadata: Mapping[str, Any]) -> tuple[Backend, Settings]:
    """The vocabulary and the settings that the metadata describe."""
    data = Metadata(metadata)
    model = data.text("tokenizer.ggml.model")
    if model is None:
        raise TokenizerError("the GGUF file holds no tokenizer: no key tokenizer.ggml.model")
    if model not in _MODELS:
        raise TokenizerError(f"GGUF tokenizer model {model!r} is not implemented{nearest(model, _MODELS)}")
    backend, config, named = _MODELS[model](data)
    architecture = data.text("general.architecture")
    limit = data.integer(f"{architecture}.context_length") if architecture else None
    config |= {f"{role}_token": named.get(role) for role in ROLES}  # null: there is none, whatever the vocabulary has
    config |= {"model_max_length": limit} if limit else {}
    end_ids = [id for key in _END_KEYS if (id := data.integer(f"tokenizer.ggml.{key}")) is not None]
    settings = Settings(config=config, named=named, templates=_templates(data), end_ids=tuple(end_ids))
    return backend, settings


def _templates(data: Metadata) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = {key[len(prefix) + 1 :]: data.text(key) for key in data.values if key.startswith(prefix + ".")}
    return {name: source for name, source in {"default": data.text(prefix), **named}.items() if source}


def _byte_level_model(data: Metadata) -> Built:
    from mlxlm.tokenizers.pretokenizers import PRE_TOKENIZERS
    from mlxlm.tokenizers.tokenizers_backend import TokenizersBackend

    name = data.text("tokenizer.ggml.pre")
    if name is None:
        warnings.warn(
            "the GGUF file does not say how its vocabulary cuts words (no key tokenizer.ggml.pre); using llama.cpp's "
            "'default', which may not be what the model was trained with",
            stacklevel=4,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(f"unknown GGUF pre-tokenizer {name!r} (tokenizer.ggml.pre); known: {known}")
    pre = PRE_TOKENIZERS[name]
    if "tokenizer.ggml.merges" not in data.values:
        raise TokenizerError("the GGUF file holds no merges for its BPE vocabulary: no key tokenizer.ggml.merges")
    merges = [_merge(merge) for merge in data.values["tokenizer.ggml.merges"]]
    vocabulary = {token: id for id, token in enumerate(data.tokens)}
    library = byte_level(vocabulary, merges, pre, add_prefix_space=data.flag("add_space_prefix", False))
    backend = TokenizersBackend(library)
    backend.add_tokens(data.added())
    bos = data.special("bos") if data.flag("add_bos_token", pre.add_bos) else None
    eos = data.special("eos") if data.flag("add_eos_token", False) else None
    backend.frame(bos, eos)
    return backend, {"tokenizer_class": "PreTrainedTokenizerFast"}, data.named()


def _merge(merge: Any) -> tuple[str, str]:
    # A part may itself be a space, never an empty string.
    cut = merge.find(" ", 1) if isinstance(merge, str) else -1
    if cut < 1:
        raise TokenizerError(f"GGUF metadata tokenizer.ggml.merges: {merge!r} is not two parts with a space between")
    return merge[:cut], merge[cut + 1 :]


def _sentencepiece_model(data: Metadata) -> Built:
    from mlxlm.tokenizers.sentencepiece_backend import Frame, SentencePieceBackend

    scores = data.numbers("scores", len(data.tokens))
    if scores is None:
        raise TokenizerError("the GGUF file holds no scores for its vocabulary: no key tokenizer.ggml.scores")
    types = list(data.types)
    unk = data.token_id("unk")
    unk_id = types.index(PieceType.UNKNOWN) if PieceType.UNKNOWN in types else 0 if unk is None else unk
    # SentencePiece wants exactly one unknown piece; converters have marked others so.
    types = [PieceType.NORMAL if kind == PieceType.UNKNOWN else kind for kind in types]
    types[unk_id] = PieceType.UNKNOWN
    # Converters write the spaces of user-defined pieces as spaces.
    pieces = [
        (token.replace(" ", _PHANTOM_SPACE) if kind == PieceType.USER_DEFINED else token, float(score), int(kind))
        for token, score, kind in zip(data.tokens, scores, types, strict=True)
    ]
    bos, eos = data.token_id("bos"), data.token_id("eos")
    model = write_model(
        pieces,
        kind=BPE,
        unk_id=unk_id,
        bos_id=-1 if bos is None else bos,
        eos_id=-1 if eos is None else eos,
        byte_fallback=PieceType.BYTE in types,
        add_dummy_prefix=data.flag("add_space_prefix", True),
        remove_extra_whitespaces=data.flag("remove_extra_whitespaces", False),
    )
    backend = SentencePieceBackend(model)
    adds_bos, adds_eos = data.flag("add_bos_token", True), data.flag("add_eos_token", False)
    before = (bos,) if adds_bos and bos is not None else ()
    after = (eos,) if adds_eos and eos is not None else ()
    backend.frame = Frame(before=before, after=after, between=before, pair_type=1)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "legacy": True,
    }
    return backend, config, data.named()


def _word_piece_model(data: Metadata) -> Built:
    from mlxlm.tokenizers.tokenizers_backend import TokenizersBackend

    # Converters write a piece inside a word without its "##", and one that begins a word with a phantom space.
    tokens = [
        token if kind == PieceType.CONTROL else _word_piece_spelling(token)
        for token, kind in zip(data.tokens, data.types, strict=True)
    ]
    named = data.named()
    bos = named.pop("bos", None)  # llama.cpp's name for the token in front
    named.pop("eos", None)
    named = {**{role: token for role, token in WORD_PIECE_TOKENS.items() if token in tokens}, **named}
    if bos is not None:
        named.setdefault("cls", bos)
    lower_case = data.flag("normalizer.lowercase", True)
    backend = TokenizersBackend(
        word_piece(
            {token: id for id, token in enumerate(tokens)},
            named,
            lower_case=lower_case,
            strip_accents=data.flag("normalizer.strip_accents", lower_case),
        )
    )
    backend.add_tokens(data.added())
    return backend, {"tokenizer_class": "PreTrainedTokenizerFast"}, named


def _word_piece_spelling(token: str) -> str:
    return token[1:] if token.startswith(_PHANTOM_SPACE) else "##" + token


_MODELS: dict[str, Callable[[Metadata], Built]] = {
    "gpt2": _byte_level_model,
    "llama": _sentencepiece_model,
    "bert": _word_piece_model,
}
