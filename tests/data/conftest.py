"""What the tests of data share: a tokenizer whose tokens are bytes, and readers' counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlxlm.tokenizers import load_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """Byte-level without merges: as many tokens as bytes; eos is id 256."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<eos>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return load_tokenizer(folder)


class CountingObjective:
    """Hands the rows on, padded with -1, with a number drawn by chance in each row."""

    def __init__(self, packs):
        self.packs = packs

    def row_length(self, max_length):
        return max_length

    def batch(self, rows, rng, max_length):
        tokens = np.full((len(rows), max_length), -1, dtype=np.int32)
        segments = np.zeros_like(tokens)
        for number, row in enumerate(rows):
            joined = np.concatenate(row)
            tokens[number, : len(joined)] = joined
            segments[number, : len(joined)] = np.repeat(np.arange(1, len(row) + 1), [len(piece) for piece in row])
        return {
            "tokens": tokens,
            "segments": segments,
            "targets": tokens.copy(),
            "chance": rng.integers(0, 1 << 30, len(rows)),
        }


@pytest.fixture
def packed_rows():
    return CountingObjective(True)


@pytest.fixture
def single_rows():
    return CountingObjective(False)
