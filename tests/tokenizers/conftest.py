"""Each kind of tokenizer, made from the tiny vocabularies of tests/fixtures/tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_fixtures import FIXTURES, byte_level_metadata, read, sentencepiece_metadata, word_piece_metadata

from mlxlm.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_gguf


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return read("texts.json")["texts"]


@pytest.fixture(scope="session")
def pairs() -> list[list[str]]:
    return read("texts.json")["pairs"]


@pytest.fixture
def directory_of(tmp_path: Path) -> Callable[..., Path]:
    """A function: name of a fixture, tokenizer_config.json or None, names of its files -> a fresh directory."""

    def copy(name: str, config: dict[str, Any] | None = None, **renamed: str) -> Path:
        target = tmp_path / "checkpoint"
        shutil.copytree(FIXTURES / name, target)
        (target / "goldens.json").unlink()
        for old, new in renamed.items():
            (target / old.replace("_", ".", 1)).rename(target / new)
        if config is not None:
            (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return target

    return copy


def _every_kind() -> dict[str, Callable[[], Tokenizer]]:
    return {
        "tokenizer.json": lambda: load_tokenizer(FIXTURES / "library"),
        "vocab.json": lambda: load_tokenizer(FIXTURES / "byte_level_files"),
        "vocab.txt": lambda: load_tokenizer(FIXTURES / "word_piece"),
        "sentencepiece-bpe": lambda: load_tokenizer(FIXTURES / "sentencepiece_bpe"),
        "sentencepiece-unigram": lambda: load_tokenizer(FIXTURES / "sentencepiece_unigram"),
        "gguf-llama": lambda: tokenizer_from_gguf(sentencepiece_metadata()),
        "gguf-gpt2": lambda: tokenizer_from_gguf(byte_level_metadata()),
        "gguf-bert": lambda: tokenizer_from_gguf(word_piece_metadata()),
    }


@pytest.fixture(scope="session", params=_every_kind().items(), ids=lambda item: item[0])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    return request.param[1]()


@pytest.fixture(scope="session")
def library_tokenizer() -> Tokenizer:
    return load_tokenizer(FIXTURES / "library")
