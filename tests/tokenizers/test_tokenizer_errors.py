"""Each file missing, empty, cut short or of the wrong kind: one clear TokenizerError that names it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tokenizer_fixtures import FIXTURES

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers import load_tokenizer

GARBAGE = {"empty": b"", "not-json": b"{nonsense", "not-utf8": b"\xff\xfe\x00{", "list": b"[1, 2]", "number": b"3"}


def refused(directory, match):
    with pytest.raises(TokenizerError, match=match) as raised:
        load_tokenizer(directory)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: there is no such directory")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file: is a file, not a directory")


def test_no_vocabulary_lists_what_was_looked_for(tmp_path):
    message = refused(tmp_path, "no tokenizer here; expected one of tokenizer.json")
    for name in ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt"):
        assert name in message


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(
    "name",
    ["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "config", "chat_template"],
)
def test_a_damaged_config(directory_of, name, garbage):
    directory = directory_of("word_piece")
    (directory / f"{name}.json").write_bytes(GARBAGE[garbage])
    assert f"{name}.json" in refused(directory, "expected a JSON object|not valid JSON|is empty|not UTF-8")


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_tokenizer_json(directory_of, garbage):
    directory = directory_of("library")
    (directory / "tokenizer.json").write_bytes(GARBAGE[garbage])
    refused(directory, "tokenizer.json: not a valid tokenizer.json")


def test_a_tokenizer_json_cut_short(directory_of):
    directory = directory_of("library")
    whole = (directory / "tokenizer.json").read_bytes()
    (directory / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    refused(directory, "tokenizer.json: not a valid tokenizer.json")


def test_a_tokenizer_json_whose_parts_don_t_fit(directory_of, capfd):
    directory = directory_of("library")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    refused(directory, "tokenizer.json: not a valid tokenizer.json")


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_damaged_sentencepiece_model(tmp_path, name, garbage):
    (tmp_path / name).write_bytes(GARBAGE[garbage])
    refused(tmp_path, "not a SentencePiece model")


def test_a_sentencepiece_model_cut_short(directory_of):
    directory = directory_of("sentencepiece_bpe")
    whole = (directory / "tokenizer.model").read_bytes()
    (directory / "tokenizer.model").write_bytes(whole[: len(whole) // 2])
    refused(directory, "not a SentencePiece model")


def test_a_tiktoken_file_is_recognized(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    refused(tmp_path, "tiktoken.*tokenizer.json")


@pytest.mark.parametrize("garbage", ["empty", "not-json", "not-utf8", "list", "number"])
def test_a_damaged_vocab_json(directory_of, garbage):
    directory = directory_of("byte_level_files")
    (directory / "vocab.json").write_bytes(GARBAGE[garbage])
    refused(directory, "vocab.json")


@pytest.mark.parametrize("ids", [{"a": -1}, {"a": "1"}, {"a": True}, {"a": 1.5}, {}], ids=repr)
def test_a_vocab_json_with_wrong_ids(directory_of, ids):
    directory = directory_of("byte_level_files")
    (directory / "vocab.json").write_text(json.dumps(ids))
    refused(directory, "vocab.json: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a\n", "merges.txt:1: expected two parts"),
        ("#version: 0.2\nĠ t\na b c\n", "merges.txt:3: expected two parts"),
        ("qq zz\n", "the merges don't fit the vocabulary"),
    ],
    ids=["one", "three", "unknown"],
)
def test_damaged_merges(directory_of, text, problem):
    directory = directory_of("byte_level_files")
    (directory / "merges.txt").write_text(text, encoding="utf-8")
    refused(directory, problem)


def test_merges_of_number_signs_are_no_comments(directory_of):
    directory = directory_of("byte_level_files")
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    (directory / "vocab.json").write_text(json.dumps({**vocabulary, "##": 600}), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n# #\n", encoding="utf-8")
    assert load_tokenizer(directory).encode("##") == [600]


@pytest.mark.parametrize(("lost", "left"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_one_of_two_files_is_missing(directory_of, lost, left):
    directory = directory_of("byte_level_files")
    (directory / lost).unlink()
    refused(directory, f"has {left} but no {lost}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "vocab.txt: is empty"), (b"\xff\n", "vocab.txt: not UTF-8"), (b"a\nb\n", r"no '\[UNK\]' \(its unk token\)")],
)
def test_a_damaged_vocab_txt(directory_of, content, problem):
    directory = directory_of("word_piece")
    (directory / "vocab.txt").write_bytes(content)
    refused(directory, problem)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("word_piece", "EsmTokenizer"), ("byte_level_files", "CLIPTokenizer"), ("sentencepiece_bpe", "BigBird")],
)
def test_a_class_that_is_not_known(directory_of, folder, name):
    refused(directory_of(folder, {"tokenizer_class": name}), f"tokenizer_class '{name}'.*not (implemented|known)")


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 3},
        {"bos_token": {"text": "x"}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "y"}}},
        {"added_tokens_decoder": {"1": 2}},
        {"additional_special_tokens": [5]},
    ],
    ids=str,
)
def test_a_config_with_wrong_values(directory_of, config):
    refused(directory_of("word_piece", config), next(iter(config)))


@pytest.mark.parametrize("value", ["1", [-1], [None], 1.5], ids=repr)
def test_a_generation_config_with_wrong_ids(directory_of, value):
    directory = directory_of("library")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    refused(directory, "generation_config.json: eos_token_id has")


def test_a_byte_order_mark_does_no_harm(directory_of):
    directory = directory_of("word_piece")
    (directory / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf" + b'{"do_lower_case": false}')
    assert load_tokenizer(directory).encode("Hello") != load_tokenizer(directory).encode("hello")


def test_importing_the_package_imports_no_library():
    code = (
        "import sys, mlxlm.tokenizers; "
        "print({'tokenizers', 'sentencepiece', 'jinja2', 'mlx.core', 'numpy'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=FIXTURES.parents[2], check=True
    )
    assert result.stdout.strip() == "set()"
