"""The tiny vocabularies of tests/fixtures/tokenizers, also in the words of GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tokenizers"


def read(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """What a GGUF file would say of the SentencePiece BPE fixture."""
    golden = read("sentencepiece_bpe/goldens.json")
    values = {
        "model": "llama",
        "tokens": golden["pieces"],
        "scores": golden["scores"],
        "token_type": golden["types"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """What a GGUF file would say of the vocab.json and merges.txt fixture, with its <...> as control tokens."""
    vocabulary = read("byte_level_files/vocab.json")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = (FIXTURES / "byte_level_files" / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    types = [3 if token.startswith("<") and token.endswith(">") and len(token) > 2 else 1 for token in tokens]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": merges,
        "token_type": types,
        "bos_token_id": vocabulary["<|endoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def word_piece_metadata(**changes: Any) -> dict[str, Any]:
    """What a GGUF file would say of the vocab.txt fixture: no "##", a phantom space in front of words."""
    words = (FIXTURES / "word_piece" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    control = [word.startswith("[") and word.endswith("]") and len(word) > 2 for word in words]
    spelled = [
        word if special else word[2:] if word.startswith("##") else "\u2581" + word
        for word, special in zip(words, control, strict=True)
    ]
    values = {
        "model": "bert",
        "tokens": spelled,
        "token_type": [3 if special else 1 for special in control],
        "unknown_token_id": words.index("[UNK]"),
        "bos_token_id": words.index("[CLS]"),
        "seperator_token_id": words.index("[SEP]"),
        "padding_token_id": words.index("[PAD]"),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
