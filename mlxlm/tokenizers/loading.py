"""Tokenizers from checkpoint directories: which files there are decides how the vocabulary is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlxlm.errors import TokenizerError, nearest
from mlxlm.tokenizers.backend import Backend
from mlxlm.tokenizers.chat import DEFAULT, read_templates
from mlxlm.tokenizers.special_tokens import AddedToken, Settings, fallback_ids, read_settings
from mlxlm.tokenizers.tokenizer_classes import (
    BYTE_LEVEL_CLASSES,
    CONVENTIONS,
    SENTENCEPIECE_CLASSES,
    WORD_PIECE_CLASSES,
    WORD_PIECE_TOKENS,
    ByteLevelClass,
    SentencePieceClass,
    default_tokens,
)

if TYPE_CHECKING:
    from mlxlm.tokenizers.sentencepiece_backend import PrefixSpace, SentencePieceBackend

LIBRARY_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model")
VOCABULARY_FILE, MERGES_FILE, WORD_LIST_FILE = "vocab.json", "merges.txt", "vocab.txt"

# Every file that decides what `read_directory` finds.
VOCABULARY_FILES = (LIBRARY_FILE, *SENTENCEPIECE_FILES, VOCABULARY_FILE, MERGES_FILE, WORD_LIST_FILE)


def read_directory(directory: Path) -> tuple[Backend, Settings]:
    """The vocabulary and the settings of a checkpoint directory.

    Of several vocabularies tokenizer.json comes first, then a SentencePiece model, vocab.json with merges.txt, and
    vocab.txt.
    """
    if not directory.is_dir():
        problem = "is a file, not a directory" if directory.exists() else "there is no such directory"
        raise TokenizerError(f"{directory}: {problem}")
    try:
        settings = read_settings(directory)
        settings.templates = read_templates(directory, settings.config)
        backend = _read_vocabulary(directory, settings)
    except TokenizerError as error:
        prefix = "" if str(error).startswith(str(directory)) else f"{directory}: "
        raise TokenizerError(f"{prefix}{error}") from None
    _name_by_id(directory, backend, settings)
    _name_by_convention(backend, settings)
    return backend, settings


def _read_vocabulary(directory: Path, settings: Settings) -> Backend:
    if (directory / LIBRARY_FILE).is_file():
        return _read_library_file(directory / LIBRARY_FILE, settings)
    for name in SENTENCEPIECE_FILES:
        if (directory / name).is_file():
            return _read_sentencepiece(directory / name, settings)
    if (directory / VOCABULARY_FILE).is_file() or (directory / MERGES_FILE).is_file():
        return _read_byte_level(directory, settings)
    if (directory / WORD_LIST_FILE).is_file():
        return _read_word_piece(directory / WORD_LIST_FILE, settings)
    raise TokenizerError(
        f"{directory}: no tokenizer here; expected one of {LIBRARY_FILE}, {', '.join(SENTENCEPIECE_FILES)}, "
        f"{VOCABULARY_FILE} with {MERGES_FILE}, or {WORD_LIST_FILE}"
    )


def _read_library_file(path: Path, settings: Settings) -> Backend:
    from mlxlm.tokenizers.tokenizers_backend import TokenizersBackend

    backend = TokenizersBackend.read(path, clean_up=bool(settings.flag("clean_up_tokenization_spaces")))
    _set_defaults(settings, backend, default_tokens(settings.tokenizer_class))
    # What is set around a text stands in the file; like transformers 5 we let it win over the flags add_bos_token and
    # add_eos_token of tokenizer_config.json, which were meant for classes that build their vocabulary themselves.
    return backend


def _read_word_piece(path: Path, settings: Settings) -> Backend:
    from mlxlm.tokenizers.tokenizers_backend import TokenizersBackend
    from mlxlm.tokenizers.vocabulary_files import read_word_list, word_piece

    _check_class(settings, WORD_PIECE_CLASSES, path.name)
    vocabulary = read_word_list(path)
    named = {**WORD_PIECE_TOKENS, **settings.named}
    library = word_piece(
        vocabulary,
        named,
        lower_case=settings.flag("do_lower_case") is not False,
        strip_accents=settings.flag("strip_accents"),
        chinese_characters=settings.flag("tokenize_chinese_chars") is not False,
    )
    backend = TokenizersBackend(library, clean_up=bool(settings.flag("clean_up_tokenization_spaces")))
    _set_defaults(settings, backend, named)
    return backend


def _read_byte_level(directory: Path, settings: Settings) -> Backend:
    from mlxlm.tokenizers.pretokenizers import PRE_TOKENIZERS
    from mlxlm.tokenizers.tokenizers_backend import TokenizersBackend
    from mlxlm.tokenizers.vocabulary_files import byte_level, read_merges, read_vocabulary

    for present, missing in ((VOCABULARY_FILE, MERGES_FILE), (MERGES_FILE, VOCABULARY_FILE)):
        if not (directory / missing).is_file():
            raise TokenizerError(f"{directory}: has {present} but no {missing}; a BPE vocabulary needs both")
    _check_class(settings, BYTE_LEVEL_CLASSES, f"{VOCABULARY_FILE} and {MERGES_FILE}")
    kind = BYTE_LEVEL_CLASSES.get(settings.tokenizer_class or "", ByteLevelClass())
    library = byte_level(
        read_vocabulary(directory / VOCABULARY_FILE),
        read_merges(directory / MERGES_FILE),
        PRE_TOKENIZERS[kind.pre],
        add_prefix_space=bool(settings.flag("add_prefix_space")),
    )
    backend = TokenizersBackend(library)
    _set_defaults(settings, backend, kind.tokens)
    _add_named(backend, settings)
    cls, sep = _special(backend, settings, "cls"), _special(backend, settings, "sep")
    if kind.paired and cls is not None and sep is not None:
        backend.frame_pairs(cls, sep)
    else:
        backend.frame(*_ends(backend, settings))
    return backend


def _read_sentencepiece(path: Path, settings: Settings) -> Backend:
    from mlxlm.tokenizers.sentencepiece_backend import SHIFTED, Frame, SentencePieceBackend

    kind = _sentencepiece_class(path, settings)
    layout = SHIFTED if kind is not None and kind.shifted else None
    backend = SentencePieceBackend.read(path, prefix_space=_prefix_space(settings), layout=layout)
    own = {role: piece for role in ("bos", "eos", "unk", "pad") if (piece := backend.special_piece(role))}
    if kind is None:  # nothing names a class: a model with bos starts a text with it, one without ends it with eos
        kind = SentencePieceClass(
            add_bos="bos" in own, add_eos="bos" not in own, tokens=own, pair_type=int("bos" in own)
        )
    backend.add_tokens(token for token in settings.added if token.id is not None)
    _add_reserved(backend, settings, kind)
    _set_defaults(settings, backend, {**own, **kind.tokens})
    _add_named(backend, settings)
    _add_conventions(backend, settings, kind)
    if kind.shifted:
        cls, sep = _special(backend, settings, "cls"), _special(backend, settings, "sep")
        before, after = ((end[1],) if end else () for end in (cls, sep))
        backend.frame = Frame(before=before, after=after, between=after)
        return backend
    bos, eos = _ends(backend, settings, kind.add_bos, kind.add_eos)
    opening = [id for content in kind.before if (id := backend.token_id(content)) is not None]
    before, after = (*opening, *((bos[1],) if bos else ())), ((eos[1],) if eos else ())
    backend.frame = Frame(before=before, after=after, between=before, pair_type=kind.pair_type)
    return backend


def _prefix_space(settings: Settings) -> PrefixSpace:
    if settings.flag("add_prefix_space") is False:
        return "never"
    return "first" if settings.flag("legacy") is False else "always"


def _sentencepiece_class(path: Path, settings: Settings) -> SentencePieceClass | None:
    name = settings.tokenizer_class
    if name is None:
        return None
    if name not in SENTENCEPIECE_CLASSES:
        if settings.flag("add_bos_token") is None and settings.flag("add_eos_token") is None:
            raise TokenizerError(
                f"tokenizer_class {name!r} with {path.name} is not known, and tokenizer_config.json does not say "
                f"add_bos_token or add_eos_token{nearest(name, SENTENCEPIECE_CLASSES)}"
            )
        return SentencePieceClass(tokens={})
    return SENTENCEPIECE_CLASSES[name]


def _add_reserved(backend: SentencePieceBackend, settings: Settings, kind: SentencePieceClass) -> None:
    """Tokens that the class puts behind the model's pieces, or between them."""
    count = settings.config.get("extra_ids")
    count = kind.extra_ids if not isinstance(count, int) else count
    backend.add_tokens(AddedToken(content=f"<extra_id_{index}>") for index in reversed(range(count)))
    if kind.shifted:
        backend.add_tokens([AddedToken(content="<pad>", id=1), AddedToken(content="<mask>", lstrip=True)])
    for index, content in enumerate(kind.reserved):
        id = backend.piece_count + index
        if content in kind.matched:
            backend.add_tokens([AddedToken(content=content, id=id)])
        else:
            backend.reserve(content, id, after=kind.follows.get(content))


def _add_conventions(backend: SentencePieceBackend, settings: Settings, kind: SentencePieceClass) -> None:
    """What was code of the class and stands in no file: the chat template, and further tokens that end an answer."""
    ends = (id for content in kind.ends if (id := backend.token_id(content)) is not None)
    settings.end_ids = (*settings.end_ids, *ends)
    name = str(settings.config.get("name_or_path") or "").lower()
    found = [template for part, template in kind.templates.items() if part in name]
    if found and not settings.templates:
        settings.templates = {DEFAULT: found[0]}


def _check_class(settings: Settings, known: Collection[str], files: str) -> None:
    name = settings.tokenizer_class
    if name is not None and name not in known:
        raise TokenizerError(
            f"tokenizer_class {name!r} with {files} is not implemented{nearest(name, known)} "
            f"A checkpoint with a {LIBRARY_FILE} works whatever its class."
        )


def _set_defaults(settings: Settings, backend: Backend, defaults: Mapping[str, str]) -> None:
    """Name the special tokens that the files don't mention, if the vocabulary has them. A null says there is none."""
    for role, content in defaults.items():
        unmentioned = settings.config.get(f"{role}_token", "") is not None and role not in settings.named
        if unmentioned and backend.token_id(content) is not None:
            settings.named[role] = content


def _add_named(backend: Backend, settings: Settings) -> None:
    backend.add_tokens(settings.added)
    backend.add_tokens(AddedToken(content=content) for content in settings.named.values())


def _special(backend: Backend, settings: Settings, role: str) -> tuple[str, int] | None:
    content = settings.named.get(role)
    id = None if content is None else backend.token_id(content)
    return None if content is None or id is None else (content, id)


def _ends(
    backend: Backend, settings: Settings, add_bos: bool = False, add_eos: bool = False
) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """What the flags add_bos_token and add_eos_token put before and behind a text; the arguments are their defaults."""
    flags = {"bos": add_bos, "eos": add_eos}
    for role, default in flags.items():
        explicit = settings.flag(f"add_{role}_token")
        flags[role] = default if explicit is None else explicit
    bos, eos = (_special(backend, settings, role) if flag else None for role, flag in flags.items())
    return bos, eos


def _name_by_id(directory: Path, backend: Backend, settings: Settings) -> None:
    """Name bos, eos and pad by the ids that the model's own configs give, where the tokenizer's files don't."""
    named = {role: token for role, id in fallback_ids(directory).items() if (token := backend.token(id)) is not None}
    _set_defaults(settings, backend, named)


def _name_by_convention(backend: Backend, settings: Settings) -> None:
    """Name the tokens of encoders by their usual texts, where all of a convention's are special tokens."""
    special = {token.content for token in backend.added if token.special}
    for convention in CONVENTIONS:
        if {convention[role] for role in ("cls", "sep", "mask")} <= special:
            _set_defaults(settings, backend, {role: text for role, text in convention.items() if text in special})
