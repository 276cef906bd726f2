"""A tokenizer as metadata of a GGUF file (its keys `tokenizer.*`): the way back from `gguf.py`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers.gguf import ID_KEYS
from mlxlm.tokenizers.model_proto import BPE, PieceType, model_kind
from mlxlm.tokenizers.pretokenizers import PRE_TOKENIZERS
from mlxlm.tokenizers.sentencepiece_backend import SPACE, SentencePieceBackend
from mlxlm.tokenizers.tokenizer import Tokenizer
from mlxlm.tokenizers.tokenizers_backend import TokenizersBackend

# Texts on which any two of the ways to cut words differ.
_PROBES = (
    "Hello world's  we'LL 12345 3.14159 1 22 333 4444",
    "naïve ÀÉ 漢字かな カタカナ 한국어 Привет мир عربى עברית हिन्दी",
    "x=[1,2];\n\n\tdef f(a):\r\n    return a**2  # !?...",
    "CamelCaseWords HTTPServer iPhone  I'd'VE don't",
    " leading, trailing \n \n\n",
    "“quotes” – dash… ½ ² ٣ Ⅳ ~`^|<>$+= e\u0301\u0327 \U0001f422\U0001f600",
)


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys `tokenizer.*`: vocabulary, types, merges or scores, special tokens and chat templates.

    rows: of the model's table; ids that the tokenizer doesn't use are filled up to there.
    Raises TokenizerError for a kind of vocabulary, or a way to cut words, that such files have no name for, and for
    more tokens than rows.
    """
    if tokenizer.vocab_size > rows:
        raise TokenizerError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows} rows")
    backend = tokenizer._backend
    if isinstance(backend, SentencePieceBackend):
        keys = _sentencepiece(tokenizer, backend, rows)
    elif isinstance(backend, TokenizersBackend):
        keys = _library(tokenizer, backend, rows)
    else:
        raise TokenizerError(f"a vocabulary of {type(backend).__name__} can't be written to GGUF files")
    found = tokenizer.encode("a")
    keys["add_bos_token"] = tokenizer.bos_id is not None and found[:1] == [tokenizer.bos_id]
    keys["add_eos_token"] = tokenizer.eos_id is not None and found[-1:] == [tokenizer.eos_id]
    for role, names in ID_KEYS.items():
        id = getattr(tokenizer, f"{role}_id")
        if id is not None:
            keys[names[0]] = id
    others = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    if others:
        keys["eot_token_id"] = others[0]
    templates = tokenizer._settings.templates
    named = {"tokenizer.chat_template" + ("" if name == "default" else f".{name}"): t for name, t in templates.items()}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | named


def _tokens(tokenizer: Tokenizer, rows: int, types: dict[int, int]) -> dict[str, Any]:
    """Texts and types of all ids; `types` holds those that aren't normal. Added tokens have their own."""
    texts = [tokenizer._backend.token(id) if id < tokenizer.vocab_size else None for id in range(rows)]
    kinds = [PieceType.UNUSED if text is None else types.get(id, PieceType.NORMAL) for id, text in enumerate(texts)]
    for token in tokenizer._backend.added:
        if token.id is not None and kinds[token.id] == PieceType.NORMAL:
            kinds[token.id] = PieceType.CONTROL if token.special else PieceType.USER_DEFINED
    tokens = [f"[PAD{id}]" if text is None else text for id, text in enumerate(texts)]
    return {"tokens": tokens, "token_type": np.array([int(kind) for kind in kinds], np.int32)}


def _library(tokenizer: Tokenizer, backend: TokenizersBackend, rows: int) -> dict[str, Any]:
    spec = json.loads(backend.files()["tokenizer.json"])
    model = spec["model"]
    kind = model.get("type")
    if kind == "WordPiece":
        return _word_piece(tokenizer, spec, rows)
    if kind != "BPE":
        raise TokenizerError(f"a vocabulary of type {kind} can't be written to GGUF files, only BPE and WordPiece")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        return _spaced(tokenizer, merges, rows)
    keys = {"model": "gpt2", "pre": _pre_tokenizer(backend), **_tokens(tokenizer, rows, {}), "merges": merges}
    first = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a")]
    return {**keys, "add_space_prefix": first[0] == first[1]}


def _pre_tokenizer(backend: TokenizersBackend) -> str:
    """The name of a way to cut words that cuts all probes as this vocabulary does."""
    library = backend._library
    if library.pre_tokenizer is None:
        raise TokenizerError("a BPE vocabulary that cuts no words can't be written to GGUF files")

    def cuts(pre: Any, normalizer: Any) -> list[list[str]]:
        texts = (text if normalizer is None else normalizer.normalize_str(text) for text in _PROBES)
        return [[piece for piece, _ in pre.pre_tokenize_str(text)] for text in texts]

    from tokenizers.normalizers import NFC

    own = cuts(library.pre_tokenizer, library.normalizer)
    for name, entry in PRE_TOKENIZERS.items():
        for prefix in (False, True):
            if cuts(entry.build(prefix), NFC() if entry.nfc else None) == own:
                return name
    raise TokenizerError("this vocabulary cuts words in a way that GGUF files have no name for")


def _spaced(tokenizer: Tokenizer, merges: list[str], rows: int) -> dict[str, Any]:
    """BPE over characters with bytes to fall back on: SentencePiece's kind, earlier merges with higher scores."""
    keys = _tokens(tokenizer, rows, {})
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    scores = np.array([-float(ranks.get(token, len(merges))) for token in keys["tokens"]], np.float32)
    for id, token in enumerate(keys["tokens"]):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            keys["token_type"][id] = int(PieceType.BYTE)
    if tokenizer.unk_id is not None:
        keys["token_type"][tokenizer.unk_id] = int(PieceType.UNKNOWN)
    first = tokenizer.encode("a", add_special_tokens=False)
    prefixed = bool(first) and tokenizer.token(first[0]).startswith(SPACE)
    return {"model": "llama", "pre": "default", **keys, "scores": scores, "add_space_prefix": prefixed}


def _sentencepiece(tokenizer: Tokenizer, backend: SentencePieceBackend, rows: int) -> dict[str, Any]:
    if model_kind(backend._model) != BPE:
        raise TokenizerError("a SentencePiece vocabulary of type Unigram can't be written to GGUF files")
    if backend._offset or backend._moved:
        raise TokenizerError("a SentencePiece vocabulary with moved ids can't be written to GGUF files")
    library, types, scores = backend._processor, {}, np.full(rows, -1e4, np.float32)
    for id in range(library.GetPieceSize()):
        scores[id] = library.GetScore(id)
        for kind, asks in (
            (PieceType.UNKNOWN, library.IsUnknown),
            (PieceType.CONTROL, library.IsControl),
            (PieceType.UNUSED, library.IsUnused),
            (PieceType.BYTE, library.IsByte),
        ):
            if asks(id):
                types[id] = kind
    keys = {"model": "llama", "pre": "default", **_tokens(tokenizer, rows, types), "scores": scores}
    return {**keys, "add_space_prefix": backend._has_prefix and backend._prefix_space != "never"}


def _word_piece(tokenizer: Tokenizer, spec: dict[str, Any], rows: int) -> dict[str, Any]:
    """Pieces inside a word lose their "##", those that begin one get a phantom space, as converters write them."""
    if spec["model"].get("continuing_subword_prefix", "##") != "##":
        raise TokenizerError("a WordPiece vocabulary with a prefix other than ## can't be written to GGUF files")
    keys = _tokens(tokenizer, rows, {})
    for id, (token, kind) in enumerate(zip(keys["tokens"], keys["token_type"], strict=True)):
        if kind == PieceType.NORMAL:
            keys["tokens"][id] = token[2:] if token.startswith("##") else SPACE + token
    normalizer = spec.get("normalizer") or {}
    lower = bool(normalizer.get("lowercase", False))
    strips = normalizer.get("strip_accents")
    flags = {"normalizer.lowercase": lower, "normalizer.strip_accents": lower if strips is None else bool(strips)}
    return {"model": "bert", "pre": "default", **keys, **flags}
