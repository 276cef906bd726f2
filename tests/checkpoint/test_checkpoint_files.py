"""JSON reading and atomic writing."""

from __future__ import annotations

import json
import os

import pytest

from mlxlm.checkpoint import read_json, write_bytes_atomic, write_json_atomic
from mlxlm.errors import CheckpointError


def test_json_round_trip_keeps_order_and_unicode(tmp_path):
    data = {"b": 1, "a": {"ż": [1.5, None, True]}}
    write_json_atomic(tmp_path / "x.json", data)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "ż" in text
    assert text.endswith("}\n")
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    assert read_json(tmp_path / "x.json") == json.loads(text) == data


def test_a_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "x.json") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b"", "not valid JSON"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
    ],
    ids=["syntax", "empty", "list", "not utf-8", "deep"],
)
def test_bad_json_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "x.json")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.json: no such file"):
        read_json(tmp_path / "absent.json")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_bytes_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_writing_replaces_a_link_and_not_its_target(tmp_path):
    (tmp_path / "blob").write_bytes(b"shared")
    (tmp_path / "x").symlink_to("blob")
    write_bytes_atomic(tmp_path / "x", b"mine")
    assert (tmp_path / "blob").read_bytes() == b"shared"
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_a_new_file_has_the_usual_permissions(tmp_path):
    write_bytes_atomic(tmp_path / "x", b"")
    (tmp_path / "y").write_bytes(b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode
