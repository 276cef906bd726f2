"""What tests share: the parity fixtures and small models."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from character_tokenizer import write_character_tokenizer

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many tests as cores run at once: more threads would only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlxlm

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def fixture_model(tmp_path):
    """A function: name of a parity fixture -> a fresh copy of its checkpoint directory, weights included."""

    def copy(name: str) -> Path:
        source, target = FIXTURES / "models" / name, tmp_path / name
        shutil.copytree(source, target)
        shared = target / "weights-of"
        if shared.exists():
            shutil.copy(FIXTURES / "models" / shared.read_text().strip() / "model.safetensors", target)
            shared.unlink()
        return target

    return copy


@pytest.fixture(scope="session")
def loaded_models(tmp_path_factory):
    """Models of the parity fixtures by name, loaded once; for tests that leave their weights as they are."""
    from mlxlm.models.loading import load_model

    class Models(dict):
        def __missing__(self, name):
            source, target = FIXTURES / "models" / name, tmp_path_factory.mktemp("model") / name
            shared = source / "weights-of"
            if shared.exists():
                shutil.copytree(source, target)
                shutil.copy(FIXTURES / "models" / shared.read_text().strip() / "model.safetensors", target)
                source = target
            self[name] = load_model(source)
            return self[name]

    return Models()


@pytest.fixture
def expected_of():
    """A function: name of a parity fixture -> transformers' inputs and outputs as numpy arrays."""
    import mlx.core as mx
    import numpy as np

    def read(name: str) -> dict[str, np.ndarray]:
        arrays = mx.load(str(FIXTURES / "models" / name / "expected.safetensors"))
        return {key: np.array(value) for key, value in arrays.items()}

    return read


@pytest.fixture
def tiny_directory(fixture_model):
    """A checkpoint directory of a 67-word decoder with a character tokenizer and a chat template."""
    directory = fixture_model("llama")
    write_character_tokenizer(directory)
    return directory


@pytest.fixture
def tiny(tiny_directory):
    """Model and tokenizer of `tiny_directory`."""
    return mlxlm.load(tiny_directory)


@pytest.fixture
def tiny_seq2seq_directory(fixture_model):
    """A checkpoint directory of a small encoder-decoder with a character tokenizer that ends texts with </s>."""
    import json
    import string

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    directory = fixture_model("t5")
    words = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase, " ", ".", ",", "?", "!", ":", *"ABCDEFGHIJ"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def tiny_seq2seq(tiny_seq2seq_directory):
    """Model and tokenizer of `tiny_seq2seq_directory`."""
    return mlxlm.load(tiny_seq2seq_directory)


@pytest.fixture
def tiny_bert_directory(fixture_model):
    """A checkpoint directory of a small masked language model with a WordPiece vocabulary."""
    import string

    directory = fixture_model("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    words += [f"##{letter}" for letter in string.ascii_lowercase] + [".", "the", "is", "##ing"]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return directory


@pytest.fixture
def tiny_bert(tiny_bert_directory):
    """Model and tokenizer of `tiny_bert_directory`."""
    return mlxlm.load(tiny_bert_directory)


@pytest.fixture
def tiny_blank_directory(tmp_path):
    """A checkpoint directory of a small model that fills blanks, with a character tokenizer."""
    import json

    import blank_filler
    import mlx.core as mx
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path / "blank-filler"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(blank_filler.config()))
    tensors = {name: mx.array(array) for name, array in blank_filler.weights().items()}
    mx.save_safetensors(str(path / "model.safetensors"), tensors, {"format": "pt"})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(blank_filler.WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(blank_filler.WORDS[:8])
    tokenizer.save(str(path / "tokenizer.json"))
    named = {"cls_token": "[CLS]", "eos_token": "<|endoftext|>", "mask_token": "[MASK]", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    return path
