"""Sources of documents: which files, which texts, and what is said about bad ones."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
import types

import pytest

from mlxlm.data import Source, read_documents
from mlxlm.data.sources import describe_files, find_files
from mlxlm.errors import DataError, UsageError


def documents(location, **settings):
    source = Source(location=str(location), **settings)
    return list(read_documents(source, find_files(source.location)))


def test_a_folder_gives_its_files_in_order_of_their_paths_without_hidden_ones(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/.hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a/z.txt", "b.txt"]


def test_a_pattern_finds_files_at_any_depth(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("x/one.txt", "two.txt", "three.md"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "**" / "*.txt") == ["two.txt", "x/one.txt"]


def test_compressed_json_lines_and_plain_text_read_alike(tmp_path):
    rows = "".join(json.dumps({"body": text}) + "\n\n" for text in ("ä", "b"))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert documents(tmp_path / "rows.jsonl", field="body") == ["ä", "b"]
    assert documents(tmp_path / "rows.jsonl.gz", field="body") == ["ä", "b"]


def test_a_separator_cuts_texts_into_documents_and_empty_ones_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("one\nmore\n\n \n\ntwo\n\n")
    (tmp_path / "empty.txt").write_text("")
    assert documents(tmp_path, separator="\n\n") == ["one\nmore", "two"]


def test_zst_without_a_module_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.txt\.zst: reading \.zst needs .* \(pip install zstandard\)"):
        documents(tmp_path / "a.txt.zst")


def test_zst_is_read_with_the_module_there_is(tmp_path, monkeypatch):
    # The module stands in for zstandard: what is tested is that its `open` gives the text.
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", types.SimpleNamespace(open=gzip.open))
    (tmp_path / "a.txt.zst").write_bytes(gzip.compress(b"text"))
    assert importlib.import_module("zstandard").open is gzip.open
    assert documents(tmp_path / "a.txt.zst") == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', r"a\.jsonl, line 1: the row has no 'text'; its keys: txt"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: 'text' is a int, not a string"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: expected an object with 'text', not a list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8 text"),
        ("a.txt", b"ab\xff", r"a\.txt: not UTF-8 text \(byte 2\)"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz can't be read"),
        ("b.txt.gz", gzip.compress(b"text" * 99)[:-12], r"b\.txt\.gz can't be read"),
    ],
    ids=["bad json", "no field", "not a string", "not an object", "row not utf-8", "not utf-8", "not gzip", "cut gzip"],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path)


def test_a_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(DataError, match=r"tain\.txt: no such file or folder; did you mean 'train\.txt'"):
        find_files(str(tmp_path / "tain.txt"))
    with pytest.raises(DataError, match="no file fits the pattern"):
        find_files(str(tmp_path / "*.md"))
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="the folder has no files"):
        find_files(str(tmp_path / "void"))


def test_settings_of_a_source_are_checked():
    with pytest.raises(UsageError, match="no setting 'wieght'; did you mean 'weight'"):
        Source.parse({"location": "a", "wieght": 1})
    for wrong in ({"weight": 0}, {"separator": ""}, {"location": ""}):
        with pytest.raises(UsageError):
            Source.parse({"location": "a", **wrong})


def test_a_data_set_of_the_hub_is_read_through_its_library(monkeypatch):
    calls = []

    class Rows(list):
        _fingerprint = "f00"

    def load_dataset(name, split):
        calls.append((name, split))
        return Rows([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = Source(location="hf:owner/name:validation")
    assert list(read_documents(source, [])) == ["one", "two"]
    assert describe_files(source)[0]["hash"] == "f00"
    assert set(calls) == {("owner/name", "validation")}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        describe_files(source)
