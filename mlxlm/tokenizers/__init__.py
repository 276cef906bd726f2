"""Tokenizers: one face over tokenizer.json, SentencePiece models, WordPiece and BPE files, and GGUF vocabularies.

    from mlxlm.tokenizers import load_tokenizer
    tokenizer = load_tokenizer("path/to/checkpoint")
    ids = tokenizer.encode("Hello")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])

The libraries that do the work (tokenizers, sentencepiece, jinja2) are imported when a file needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxlm.tokenizers.detokenizer import Detokenizer
from mlxlm.tokenizers.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer", "tokenizer_from_gguf"]


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face checkpoint directory.

    Raises TokenizerError when there is none, or a file is malformed or of a kind that is not implemented.
    """
    from mlxlm.tokenizers.loading import read_directory

    return Tokenizer(*read_directory(Path(directory)))


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file.

    metadata: the file's keys and values; those used are `tokenizer.*`, `general.architecture` and the architecture's
    `context_length`. Values are Python objects, or arrays with `tolist()`.
    """
    from mlxlm.tokenizers.gguf import read_gguf

    return Tokenizer(*read_gguf(metadata))
