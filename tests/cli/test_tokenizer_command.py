"""`mlxlm tokenizer`: train, encode, decode, stats."""

from __future__ import annotations

import json

import pytest

TEXT = "the cat sat on the mat, the bat sat on the hat\n" * 20


@pytest.fixture
def made(tmp_path, mlxlm_command):
    (tmp_path / "a.txt").write_text(TEXT)
    arguments = ("--kind", "byte-level-bpe", "--vocab-size", 280, "--data", tmp_path / "a.txt")
    status, out, err = mlxlm_command("tokenizer", "train", *arguments, "--output", tmp_path / "t")
    assert (status, out) == (0, "")
    assert "280 tokens" in err
    return tmp_path / "t"


def test_encode_and_decode_are_inverse(made, mlxlm_command):
    status, ids, _ = mlxlm_command("tokenizer", "encode", "--tokenizer", made, "the cat\n")
    assert status == 0
    assert mlxlm_command("tokenizer", "decode", "--tokenizer", made, *ids.split()) == (0, "the cat\n\n", "")
    assert mlxlm_command("tokenizer", "decode", "--tokenizer", made, stdin=ids)[1] == "the cat\n\n"
    assert mlxlm_command("tokenizer", "encode", "--tokenizer", made, stdin="the cat\n")[1] == ids
    rows = mlxlm_command("tokenizer", "encode", "--tokenizer", made, "--tokens", "the cat\n")[1].splitlines()
    assert [row.split("\t")[0] for row in rows] == ids.split()


def test_stats_say_what_the_tokenizer_does(made, tmp_path, mlxlm_command):
    arguments = ("tokenizer", "stats", "--tokenizer", made, "--data", tmp_path / "a.txt")
    found = json.loads(mlxlm_command(*arguments, "--json")[1])
    assert found["characters"] == found["bytes"] == len(TEXT)
    assert found["characters_per_token"] == len(TEXT) / found["tokens"] > 2
    assert found["unknown_rate"] == 0
    table = mlxlm_command(*arguments)[1]
    assert "characters per token" in table
    assert f"{found['tokens']:,}" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--kind", "bpe", "--vocab-size", 300, "--data", "a.txt"), "unknown tokenizer kind 'bpe'"),
        (("train", "--kind", "wordpiece", "--vocab-size", 300, "--data", "b.txt"), "b.txt: no such file"),
        (("train", "--kind", "wordpiece", "--vocab-size", 300, "--data", "rows.jsonl"), "rows.jsonl, line 2: not"),
    ],
    ids=["kind", "missing file", "bad row"],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, mlxlm_command, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text"\n')
    status, out, err = mlxlm_command("tokenizer", *arguments, "--output", tmp_path / "t")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "t").exists()


def test_an_id_that_is_none_is_refused(made, mlxlm_command):
    status, _, err = mlxlm_command("tokenizer", "decode", "--tokenizer", made, "12", "x3")
    assert status == 2
    assert "'x3' is not an id" in err
