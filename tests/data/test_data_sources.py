"""Sources of documents: which files, which texts, and what is said about bad ones."""

from __future__ import annotations

import gzip
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
    # The module stands in for Python 3.14's: what is tested is that its `open` gives the text.
    monkeypatch.setitem(sys.modules, "compression.zstd", types.SimpleNamespace(open=gzip.open))
    (tmp_path / "a.txt.zst").write_bytes(gzip.compress(b"text"))
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


def test_a_real_zst_file_is_read_and_a_false_one_named(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="reading .zst needs zstandard before Python 3.14")
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert documents(tmp_path / "rows.jsonl.zst") == ["one", "two"]
    long = "".join(f"{number} " for number in range(100_000))
    frames = [zstandard.compress(part.encode()) for part in (long[:1000], long[1000:])]
    (tmp_path / "frames.txt.zst").write_bytes(b"".join(frames))
    assert documents(tmp_path / "frames.txt.zst") == [long]
    for content in (b"no zst at all", zstandard.compress(b"text " * 1000)[:20]):
        (tmp_path / "bad.txt.zst").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.txt\.zst can't be read"):
            documents(tmp_path / "bad.txt.zst")


def test_a_real_data_set_is_read(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="hf:NAME needs the package datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a row"}\n{"text": "another"}\n')
    assert list(read_documents(Source(location=f"hf:{tmp_path / 'set'}"), [])) == ["a row", "another"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("café".encode("latin-1"), r"not UTF-8 text \(byte 3\); convert it"),
        ("text".encode("utf-16"), r"not UTF-8 text \(byte 0\)"),
        (bytes(range(256)), r"not UTF-8 text \(byte 128\)"),
    ],
    ids=["latin-1", "utf-16", "binary"],
)
def test_what_is_no_utf_8_is_named_with_what_to_do(content, text, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=text):
        documents(tmp_path / "a.txt")


def test_a_link_to_nothing_is_not_offered_as_itself(tmp_path):
    (tmp_path / "link.txt").symlink_to("/nowhere/at/all")
    (tmp_path / "line.txt").write_text("text")
    with pytest.raises(DataError, match=r"link\.txt: no such file or folder; did you mean 'line\.txt'\?$"):
        documents(tmp_path / "link.txt")
