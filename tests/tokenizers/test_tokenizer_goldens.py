"""Ids, texts and special tokens against transformers' own results (goldens.json of each fixture)."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizer_fixtures import FIXTURES, read
from tokenizers import Tokenizer as Library

from mlxlm.tokenizers import load_tokenizer

CASES = [("library", None)] + [
    (folder, name) for folder in ("byte_level_files", "word_piece") for name in read(f"{folder}/goldens.json")
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(filter(None, case)))
def case(request, tmp_path_factory):
    """A tokenizer and its goldens."""
    folder, name = request.param
    goldens = read(f"{folder}/goldens.json")
    if name is None:
        return load_tokenizer(FIXTURES / folder), goldens
    directory = tmp_path_factory.mktemp(name) / "checkpoint"
    shutil.copytree(FIXTURES / folder, directory)
    (directory / "tokenizer_config.json").write_text(json.dumps(goldens[name]["config"]))
    return load_tokenizer(directory), goldens[name]


def test_texts_get_the_same_ids(case, texts):
    tokenizer, goldens = case
    assert [tokenizer.encode(text) for text in texts] == goldens["ids"]


def test_texts_get_the_same_ids_without_special_tokens(case, texts):
    tokenizer, goldens = case
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == goldens["bare_ids"]


def test_a_batch_gets_the_same_ids_as_its_texts(case, texts):
    tokenizer, goldens = case
    assert tokenizer.encode_batch(texts) == goldens["ids"]
    assert tokenizer.encode_batch(texts, add_special_tokens=False) == goldens["bare_ids"]


def test_pairs_get_the_same_ids_and_types(case, pairs):
    tokenizer, goldens = case
    for (text, pair), (ids, types) in zip(pairs, goldens["pairs"], strict=True):
        assert tokenizer.encode_with_types(text, pair)[0] == tokenizer.encode(text, pair) == ids
        if types is not None:
            assert tokenizer.encode_with_types(text, pair)[1] == types


def test_ids_get_the_same_texts(case, texts):
    tokenizer, goldens = case
    for text, ids, decoded in zip(texts, goldens["ids"], goldens["decoded"], strict=True):
        if "naïve" in text and "\ufffd" in decoded:
            continue  # see test_an_added_token_decodes_to_its_own_text
        assert tokenizer.decode(ids) == decoded


def test_random_ids_get_the_same_texts(case):
    tokenizer, goldens = case
    for stream in goldens["streams"]:
        assert tokenizer.decode(stream["ids"], skip_special_tokens=False) == stream["text"]
        assert tokenizer.decode(stream["ids"]) == stream["skipped"]


def test_size_and_special_ids_are_the_same(case):
    tokenizer, goldens = case
    assert tokenizer.vocab_size == goldens["size"]
    assert {role: getattr(tokenizer, f"{role}_id") for role in goldens["special"]} == goldens["special"]


def test_an_added_token_decodes_to_its_own_text(library_tokenizer):
    # The library takes "naïve" for byte-level spelling and gives "na\ufffdve"; the text that was encoded is right.
    ids = library_tokenizer.encode("naïve", add_special_tokens=False)
    assert [library_tokenizer.token(id) for id in ids] == ["naïve"]
    assert Library.from_file(str(FIXTURES / "library" / "tokenizer.json")).decode(ids) == "na\ufffdve"
    assert library_tokenizer.decode(ids) == "naïve"


def test_truncation_and_padding_of_the_file_are_not_applied(library_tokenizer):
    assert len(library_tokenizer.encode("x y " * 100)) > 100  # the file cuts at 16
    assert len(library_tokenizer.encode("x")) == 2  # and pads to 16
    assert list(map(len, library_tokenizer.encode_batch(["x", "x y"]))) == [2, 4]


def test_an_empty_pair_is_a_pair(library_tokenizer):
    assert library_tokenizer.encode("x", "") == [*library_tokenizer.encode("x"), library_tokenizer.bos_id]
