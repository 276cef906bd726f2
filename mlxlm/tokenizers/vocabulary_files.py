"""Vocabularies from the files of the original implementations: vocab.txt, and vocab.json with merges.txt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers.pretokenizers import PreTokenizer
from mlxlm.tokenizers.special_tokens import read_json

Merges = list[tuple[str, str]]


def read_word_list(path: Path) -> dict[str, int]:
    """A vocab.txt: one token a line, its id is the line's number from 0. A token listed twice keeps its last line."""
    lines = _read_text(path).split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    if not lines:
        raise TokenizerError(f"{path}: is empty, expected one token a line")
    return {token: index for index, token in enumerate(lines)}


def read_vocabulary(path: Path) -> dict[str, int]:
    """A vocab.json: an object of token -> id."""
    vocabulary = read_json(path)
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise TokenizerError(f"{path}: expected an object of token -> id")
    for token, id in vocabulary.items():
        if not isinstance(id, int) or isinstance(id, bool) or id < 0:
            raise TokenizerError(f"{path}: {token!r} has the id {id!r}, expected a number from 0 on")
    return vocabulary


def read_merges(path: Path) -> Merges:
    """A merges.txt: an optional "#version" line, then two parts a line."""
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise TokenizerError(f"{path}:{number}: expected two parts with one space between them, got {line!r}")
        merges.append((parts[0], parts[1]))
    return merges


def word_piece(
    vocabulary: dict[str, int],
    tokens: dict[str, str],
    *,
    lower_case: bool = True,
    strip_accents: bool | None = None,
    chinese_characters: bool = True,
) -> tokenizers.Tokenizer:
    """WordPiece with the text cleaning of its first implementation (Devlin et al. 2019, arXiv:1810.04805).

    tokens: roles -> texts; "unk", "cls" and "sep" must be in the vocabulary.  strip_accents: None follows lower_case.
    chinese_characters: put spaces around CJK ideographs.
    """
    for role in ("unk", "cls", "sep"):
        if tokens.get(role) not in vocabulary:
            raise TokenizerError(
                f"the WordPiece vocabulary has no {tokens.get(role)!r} (its {role} token); "
                f"name it in tokenizer_config.json as '{role}_token'"
            )
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=tokens["unk"]))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese_characters, strip_accents=strip_accents, lowercase=lower_case
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    cls, sep = ((tokens[role], vocabulary[tokens[role]]) for role in ("cls", "sep"))
    library.post_processor = processors.BertProcessing(sep, cls)
    return library


def byte_level(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer, *, add_prefix_space: bool = False
) -> tokenizers.Tokenizer:
    """Byte-level BPE (Radford et al. 2019)."""
    try:
        model = models.BPE(vocabulary, list(merges), ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises bare Exception: a merge of tokens that don't exist
        raise TokenizerError(f"the merges don't fit the vocabulary: {error}") from None
    library = tokenizers.Tokenizer(model)
    if pre.nfc:
        library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre.build(add_prefix_space)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    return library


def check_tokens(tokens: Any, where: str) -> list[str]:
    """The tokens as a list of distinct strings; an empty one gets a name, as llama.cpp does it."""
    names = [token or f"[EMPTY_{index}]" for index, token in enumerate(_strings(tokens, where))]
    if len(set(names)) != len(names):
        seen: dict[str, int] = {}
        for index, name in enumerate(names):
            if name in seen:
                raise TokenizerError(f"{where}: {name!r} stands at {seen[name]} and at {index}")
            seen[name] = index
    return names


def _strings(tokens: Any, where: str) -> Iterable[str]:
    values = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise TokenizerError(f"{where}: expected a list of strings")
    if not values:
        raise TokenizerError(f"{where}: is empty")
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise TokenizerError(f"{path}: can't be read ({error.strerror or error})") from None
