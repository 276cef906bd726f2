"""`mlxlm classify`: labels on stdout, the rows of a file kept."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

import mlxlm
from mlxlm.generation import classify
from mlxlm.models import with_classification_head

TEXTS = ["the abc is", "a", "zzz the ing is abcdef", "q q q"]


@pytest.fixture
def classifier(tiny_bert):
    model, tokenizer = tiny_bert
    mx.random.seed(0)
    return with_classification_head(model, "sequence", ["bad", "good", "fine"]), tokenizer


def test_the_command_prints_labels_and_keeps_rows(mlxlm_command, classifier, tmp_path):
    model, tokenizer = classifier
    mlxlm.save(model, tokenizer, tmp_path / "model")
    expected = [one.label for one in classify(model, tokenizer, TEXTS)]
    status, out, err = mlxlm_command("classify", "--model", tmp_path / "model", *TEXTS)
    assert (status, [line.split("\t")[0] for line in out.splitlines()]) == (0, expected), err
    rows = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS))
    status, out, _ = mlxlm_command("classify", "--model", tmp_path / "model", "--input", "-", stdin=rows)
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["predicted"] for row in found] == expected
    assert [row["id"] for row in found] == [0, 1, 2, 3]
    status, _, err = mlxlm_command("classify", "--model", tmp_path / "model")
    assert (status, err.count("\n")) == (2, 1)


def test_the_words_of_a_text_are_labelled_by_a_head_over_tokens(mlxlm_command, tiny_bert, tmp_path):
    model, tokenizer = tiny_bert
    mlxlm.save(with_classification_head(model, "tokens", ["O", "X"]), tokenizer, tmp_path / "model")
    status, out, _ = mlxlm_command("classify", "--model", tmp_path / "model", "the abc", "a")
    assert status == 0
    assert [[pair.split("/")[0] for pair in line.split()] for line in out.splitlines()] == [["the", "abc"], ["a"]]
    assert {pair.split("/")[1] for pair in out.split()} <= {"O", "X"}
