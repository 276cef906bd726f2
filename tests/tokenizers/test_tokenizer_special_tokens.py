"""What the files beside a vocabulary say: special tokens, added tokens, ids that end an answer, limits."""

from __future__ import annotations

import json

import pytest
from tokenizer_fixtures import read

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers import load_tokenizer

VOCABULARY = read("byte_level_files/vocab.json")


def write(directory, **files):
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def test_tokens_may_be_text_or_objects(library_tokenizer):
    assert (library_tokenizer.bos_id, library_tokenizer.eos_id, library_tokenizer.pad_id) == (0, 1, 2)
    assert library_tokenizer.token(library_tokenizer.mask_id) == "[MASK]"
    assert library_tokenizer.unk_id is library_tokenizer.cls_id is library_tokenizer.sep_id is None


def test_special_ids_are_all_special_added_tokens(library_tokenizer):
    names = {library_tokenizer.token(id) for id in library_tokenizer.special_ids}
    assert names == {"<s>", "</s>", "<pad>", "<|start|>", "<|end|>", "[MASK]"}  # and not "naïve"


def test_the_limit_that_means_none_is_none(library_tokenizer, directory_of):
    assert library_tokenizer.model_max_length is None
    assert load_tokenizer(directory_of("word_piece", {"model_max_length": 512})).model_max_length == 512


def test_the_generation_config_ends_answers(directory_of):
    directory = directory_of("library")
    assert load_tokenizer(directory).stop_ids == {1, 4}
    write(directory, generation_config={"eos_token_id": 3})
    # <|end|> (4) is an end-of-turn token that the template writes.
    assert load_tokenizer(directory).stop_ids == {1, 3, 4}
    (directory / "generation_config.json").unlink()
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(directory).stop_ids == {1}


def test_an_end_of_turn_that_is_no_token_of_its_own_ends_nothing(directory_of):
    directory = directory_of("library")
    (directory / "generation_config.json").unlink()
    (directory / "chat_template.jinja").write_text("{{ messages }}<|im_end|>")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.token_id("<|im_end|>") is None
    assert tokenizer.stop_ids == {1}


def test_older_files_are_merged(directory_of):
    directory = directory_of("byte_level_files", {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>"})
    write(
        directory,
        special_tokens_map={
            "bos_token": "<unk>",  # tokenizer_config.json wins
            "pad_token": {
                "content": "<pad>",
                "lstrip": False,
                "normalized": True,
                "rstrip": False,
                "single_word": False,
            },
            "additional_special_tokens": ["<|tool|>"],
        },
        added_tokens={"<|tool|>": 600, "<extra>": 601},
    )
    tokenizer = load_tokenizer(directory)
    assert tokenizer.bos_id == VOCABULARY["<s>"]
    assert tokenizer.pad_id == VOCABULARY["<pad>"]
    assert tokenizer.eos_id == VOCABULARY["<|endoftext|>"]  # the class's default
    assert (tokenizer.token_id("<|tool|>"), tokenizer.token_id("<extra>"), tokenizer.vocab_size) == (600, 601, 602)
    assert 600 in tokenizer.special_ids
    assert 601 not in tokenizer.special_ids
    assert tokenizer.encode("a<|tool|><extra>")[-2:] == [600, 601]


def test_the_decoder_of_added_tokens_replaces_the_older_files(directory_of):
    tokens = {"600": {"content": "<new>", "special": True}}
    directory = directory_of("byte_level_files", {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": tokens})
    write(directory, added_tokens={"<old>": 600})
    tokenizer = load_tokenizer(directory)
    assert tokenizer.token(600) == "<new>"
    assert tokenizer.token_id("<old>") is None


def test_an_id_that_can_t_be_given_is_an_error(directory_of):
    tokens = {"700": {"content": "<new>", "special": True}}
    directory = directory_of("byte_level_files", {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": tokens})
    with pytest.raises(TokenizerError, match="'<new>' should have id 700, but the vocabulary gives it 600"):
        load_tokenizer(directory)


def test_a_special_token_that_is_nowhere_is_added_at_the_end(directory_of):
    tokenizer = load_tokenizer(
        directory_of("byte_level_files", {"tokenizer_class": "GPT2Tokenizer", "pad_token": "[PAD]"})
    )
    assert tokenizer.pad_id == len(VOCABULARY)
    assert tokenizer.vocab_size == len(VOCABULARY) + 1


def test_null_and_empty_tokens_are_none(directory_of):
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": None, "unk_token": ""}
    tokenizer = load_tokenizer(directory_of("byte_level_files", config))
    assert tokenizer.bos_id is None
    assert tokenizer.eos_id == VOCABULARY["<|endoftext|>"]


def test_without_a_config_the_model_s_ids_name_the_tokens(directory_of):
    directory = directory_of("library")
    (directory / "tokenizer_config.json").unlink()
    (directory / "generation_config.json").unlink()
    assert load_tokenizer(directory).eos_id is None
    write(directory, config={"bos_token_id": 0, "eos_token_id": [4, 1], "pad_token_id": 2})
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 4, 2)
    write(directory, generation_config={"eos_token_id": 1, "pad_token_id": 1})
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 1, {1, 4})


def test_the_class_may_stand_in_the_model_s_config(directory_of):
    directory = directory_of("byte_level_files")
    write(directory, config={"tokenizer_class": "RobertaTokenizer"})
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("a")[0] == tokenizer.cls_id == VOCABULARY["<s>"]


@pytest.mark.parametrize("kind", ["word_piece", "encoder"])
def test_an_encoder_s_tokens_are_known_by_their_usual_names(directory_of, kind, tmp_path):
    source = (
        directory_of("word_piece", {})
        if kind == "word_piece"
        else directory_of("byte_level_files", {"tokenizer_class": "RobertaTokenizer"})
    )
    whole = load_tokenizer(source)
    whole.save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer_config.json").unlink()
    bare = load_tokenizer(tmp_path / "saved")
    for role in ("cls", "sep", "mask", "pad", "unk"):
        assert getattr(bare, f"{role}_id") == getattr(whole, f"{role}_id") is not None


def test_tokenizer_json_wins_over_the_flags_of_the_config(directory_of):
    # test_tokenizer_parity.py shows that transformers does the same.
    directory = directory_of("library")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    write(directory, tokenizer_config={**config, "add_bos_token": False, "add_eos_token": True})
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("a") == [0, *tokenizer.encode("a", add_special_tokens=False)]


def test_tokens_and_ids_translate_both_ways(any_tokenizer):
    for id in range(0, any_tokenizer.vocab_size, 7):
        assert any_tokenizer.token_id(any_tokenizer.token(id)) == id
    assert any_tokenizer.token_id("no such token") is None
    with pytest.raises(TokenizerError, match=f"run from 0 to {any_tokenizer.vocab_size - 1}"):
        any_tokenizer.token(any_tokenizer.vocab_size)


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"]], ids=repr)
def test_only_text_can_be_encoded(any_tokenizer, text):
    with pytest.raises(TokenizerError, match="expected a text to encode"):
        any_tokenizer.encode(text)
    with pytest.raises(TokenizerError, match="expected a text to encode"):
        any_tokenizer.encode_batch(["a", text])


def test_half_a_pair_is_an_error(any_tokenizer):
    with pytest.raises(TokenizerError, match=r"half of a UTF-16 pair \(U\+D83D\) at 3"):
        any_tokenizer.encode("ab \ud83d")


def test_one_text_is_no_batch(any_tokenizer):
    with pytest.raises(TokenizerError, match="list of texts"):
        any_tokenizer.encode_batch("abc")
    assert any_tokenizer.encode_batch([]) == []
