"""Saving and loading again gives the same tokenizer, whatever it came from."""

from __future__ import annotations

import json

import pytest
from tokenizer_fixtures import byte_level_metadata, sentencepiece_metadata

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers import load_tokenizer, tokenizer_from_gguf

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"


def state(tokenizer, texts, pairs):
    """All that can be seen of a tokenizer from outside."""
    roles = ("bos", "eos", "pad", "unk", "mask", "cls", "sep")
    ids = [tokenizer.encode(text) for text in texts]
    return {
        "special": {role: getattr(tokenizer, f"{role}_id") for role in roles},
        "sets": (tokenizer.stop_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer.model_max_length),
        "template": tokenizer.chat_template,
        "ids": ids,
        "bare": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        "pairs": [tokenizer.encode_with_types(*pair) for pair in pairs],
        "texts": [tokenizer.decode(row, skip_special_tokens=False) for row in ids],
        "tokens": [tokenizer.token(id) for id in range(0, tokenizer.vocab_size, 5)],
    }


def test_what_is_saved_is_loaded_again(any_tokenizer, tmp_path, texts, pairs):
    any_tokenizer.save(tmp_path / "saved")
    assert state(load_tokenizer(tmp_path / "saved"), texts, pairs) == state(any_tokenizer, texts, pairs)


def test_saving_twice_into_one_place_gives_the_same_files(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    load_tokenizer(tmp_path).save(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("metadata", [sentencepiece_metadata, byte_level_metadata], ids=["llama", "gpt2"])
def test_a_gguf_tokenizer_keeps_template_limit_and_ends(metadata, tmp_path, texts, pairs):
    values = metadata(add_eos_token=True, eot_token_id=5) | {
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.chat_template.rag": "{{ documents }}",
        "general.architecture": "x",
        "x.context_length": 77,
    }
    tokenizer = tokenizer_from_gguf(values)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert state(again, texts, pairs) == state(tokenizer, texts, pairs)
    assert again.stop_ids == {5, tokenizer.eos_id}
    assert again.model_max_length == 77
    assert again.render_chat([{"role": "r", "content": "c"}], chat_template="rag", documents=[1]) == "[1]"


@pytest.mark.parametrize("config", [{"legacy": False}, {"add_prefix_space": False}, {"add_eos_token": True}], ids=str)
def test_the_ways_of_a_sentencepiece_class_are_kept(directory_of, tmp_path, texts, pairs, config):
    tokenizer = load_tokenizer(directory_of("sentencepiece_bpe", {"tokenizer_class": "LlamaTokenizer", **config}))
    tokenizer.save(tmp_path / "saved")
    assert state(load_tokenizer(tmp_path / "saved"), texts, pairs) == state(tokenizer, texts, pairs)


@pytest.mark.parametrize("name", ["T5Tokenizer", "XLMRobertaTokenizer", "ChatGLMTokenizer"])
def test_tokens_beside_the_model_are_kept(directory_of, tmp_path, texts, pairs, name):
    kind = "sentencepiece_unigram" if name == "T5Tokenizer" else "sentencepiece_bpe"
    tokenizer = load_tokenizer(directory_of(kind, {"tokenizer_class": name}))
    tokenizer.save(tmp_path / "saved")
    assert state(load_tokenizer(tmp_path / "saved"), texts, pairs) == state(tokenizer, texts, pairs)


def test_truncation_and_padding_stay_in_the_file(library_tokenizer, tmp_path):
    library_tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 16
    assert saved["padding"]["strategy"] == {"Fixed": 16}
    assert len(library_tokenizer.encode("x y " * 100)) > 100


def test_the_model_s_generation_config_is_left_alone(library_tokenizer, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.5}')
    library_tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 1, "temperature": 0.5}


def test_files_of_another_tokenizer_are_not_mixed_in(library_tokenizer, directory_of):
    directory = directory_of("sentencepiece_bpe", {"chat_template": "old"})
    before = sorted(path.name for path in directory.iterdir())
    with pytest.raises(TokenizerError, match=r"holds tokenizer\.model of another tokenizer"):
        library_tokenizer.save(directory)
    assert sorted(path.name for path in directory.iterdir()) == before


def test_a_left_over_template_is_not_adopted(any_tokenizer, tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": "x"}')
    with pytest.raises(TokenizerError, match=r"chat_template\.json"):
        any_tokenizer.save(tmp_path)


def test_a_place_that_can_t_be_written_is_one_clear_error(library_tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TokenizerError, match="can't be written"):
        library_tokenizer.save(tmp_path / "file" / "below")


def test_an_interrupted_write_leaves_the_old_file(library_tokenizer, tmp_path, monkeypatch):
    library_tokenizer.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TokenizerError, match="No space left"):
        library_tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_template_s_name_can_t_leave_the_folder(directory_of, tmp_path):
    tokenizer = load_tokenizer(directory_of("word_piece", {"chat_template": {"default": "x", "../../evil": "y"}}))
    with pytest.raises(TokenizerError, match="name that can't be a file's"):
        tokenizer.save(tmp_path / "saved")
