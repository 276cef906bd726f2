"""GGUF files that are written: read back by this package and by the `gguf` package."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlxlm.checkpoint import open_gguf, open_safetensors
from mlxlm.checkpoint.gguf_writer import encode, gguf_layout
from mlxlm.conversion import GgufTarget, HubTarget, convert
from mlxlm.errors import CheckpointError, TokenizerError, UnsupportedModelError, UsageError
from mlxlm.tokenizers import load_tokenizer, tokenizer_from_gguf
from mlxlm.tokenizers.gguf_writing import gguf_vocabulary

TOKENIZERS = Path(__file__).parent.parent / "fixtures" / "tokenizers"


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "llama-wavelength", "qwen3", "gpt2", "bloom", "falcon", "phi3"]
)
def test_a_model_goes_there_and_back_unchanged(name, fixture_model, tmp_path):
    source = fixture_model(name)
    convert(source, tmp_path / "x.gguf", GgufTarget(kind="F32"))
    convert(tmp_path / "x.gguf", tmp_path / "back", HubTarget())
    before, after = open_safetensors(source / "model.safetensors").load(), open_safetensors(tmp_path / "back").load()
    assert before.keys() == after.keys()
    assert all(mx.array_equal(after[key], array) for key, array in before.items())
    assert "(no tokenizer" not in (tmp_path / "x.md").read_text()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_are_those_of_the_gguf_package(kind):
    values = np.random.default_rng(3).normal(size=(6, 96)).astype(np.float32)
    values[2, :32] = 0
    expected = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(np.frombuffer(encode(mx.array(values), kind), np.uint8), expected.view(np.uint8).reshape(-1))


def test_the_gguf_package_reads_what_is_written(wide, tmp_path):
    result = convert(wide("llama"), tmp_path / "x.gguf", GgufTarget(kind="Q4_0", embeddings="Q8_0"))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["output_norm.weight"] == "F32"
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.embedding_length"].contents() == 128
    assert result.nbytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    ours = open_gguf(tmp_path / "x.gguf")
    assert {info.name: info.shape for info in ours.tensors.values()} == {
        tensor.name: tuple(int(n) for n in tensor.shape)[::-1] for tensor in reader.tensors
    }


def test_metadata_of_every_type_is_read_back(tmp_path):
    metadata = {
        "s": "żółw",
        "b": True,
        "u": 2**32 - 1,
        "i": -5,
        "big": 2**40,
        "f": 0.5,
        "strings": ["a", "", "b"],
        "array": np.array([1, -2], np.int32),
        "empty": [],
        "ints": [1, 2],
    }
    layout = gguf_layout(metadata, [("w", "F32", (2, 3))])
    (tmp_path / "x.gguf").write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    read = open_gguf(tmp_path / "x.gguf").metadata
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in read.items()}
    assert plain == {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}
    with pytest.raises(CheckpointError, match="no type for dict"):
        gguf_layout({"d": {}}, [])
    with pytest.raises(CheckpointError, match="values of different types"):
        gguf_layout({"d": [1, "a"]}, [])
    with pytest.raises(CheckpointError, match="can't be stored as Q8_0"):
        gguf_layout({}, [("w", "Q8_0", (2, 3))])


def test_values_that_a_type_cannot_hold_are_refused():
    with pytest.raises(CheckpointError, match="too large for float16"):
        encode(mx.array([1e6]), "F16")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        encode(mx.full((32,), float("nan")), "Q8_0")


def test_what_the_format_has_no_place_for_is_refused(fixture_model, tmp_path):
    for name in ("gptj", "bert-sequence"):
        with pytest.raises(UnsupportedModelError, match="GGUF"):
            convert(fixture_model(name), tmp_path / "x.gguf", GgufTarget())
    with pytest.raises(UsageError, match="not in 'Q2'"):
        GgufTarget(kind="Q2")


REFUSED = {"library", "sentencepiece_unigram"}
TEXTS = ["Hello world's 12345", "  naïve 漢字 \n\n x=[1];", "<|im_start|>user"]


@pytest.mark.parametrize("folder", sorted(path.name for path in TOKENIZERS.iterdir() if path.is_dir()))
def test_tokenizers_encode_the_same_from_gguf(folder):
    tokenizer = load_tokenizer(TOKENIZERS / folder)
    if folder in REFUSED:
        with pytest.raises(TokenizerError, match=r"can't be written to GGUF files|no name for"):
            gguf_vocabulary(tokenizer, tokenizer.vocab_size + 3)
        return
    metadata = gguf_vocabulary(tokenizer, tokenizer.vocab_size + 3)
    again = tokenizer_from_gguf({"general.architecture": "llama", **metadata})
    assert again.vocab_size == tokenizer.vocab_size + 3
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text), text
    assert again.stop_ids == tokenizer.stop_ids
    assert again.chat_template == tokenizer.chat_template


def test_more_tokens_than_rows_are_refused(tiny_directory):
    tokenizer = load_tokenizer(tiny_directory)
    with pytest.raises(TokenizerError, match="tokens, the model only 3 rows"):
        gguf_vocabulary(tokenizer, 3)
