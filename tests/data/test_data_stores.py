"""Stores: what is written, what is kept after an interrupt, what is noticed, and how documents are split."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlxlm.data import Mixture, build_store, prepare
from mlxlm.data.building import _Worker
from mlxlm.data.store import TokenStore, token_type
from mlxlm.errors import DataError, UsageError


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(store, tokenizer):
    return [tokenizer.decode(store.tokens(number)) for number in range(len(store))]


def shards(folder):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).rglob("shard-*")}


def test_documents_come_back_with_an_end_of_text(tmp_path, byte_tokenizer):
    texts = ["a", "zwei", "drei\n" * 50, "x" * 999]
    source = write_rows(tmp_path / "a.jsonl", [texts[0], "", *texts[1:], "  \n"])
    store = build_store(source, byte_tokenizer, tmp_path / "cache", chunk_characters=100)
    assert texts_of(store, byte_tokenizer) == texts
    assert [int(store.tokens(number)[-1]) for number in range(4)] == [byte_tokenizer.eos_id] * 4
    assert store.num_tokens == sum(len(text) + 1 for text in texts)
    assert store.tokens(1, 1, 3).tolist() == store.tokens(1)[1:3].tolist()
    assert len(store.shards) == 2
    assert store.dtype == np.uint16


def test_token_types_hold_every_id():
    assert token_type(65536) == np.uint16
    assert token_type(65537) == np.uint32


def test_processes_give_what_one_gives(tmp_path, byte_tokenizer):
    source = write_rows(tmp_path / "a.jsonl", [f"text {number} " * (number % 7 + 1) for number in range(60)])
    alone = build_store(source, byte_tokenizer, tmp_path / "one", processes=1, chunk_characters=300)
    together = build_store(source, byte_tokenizer, tmp_path / "two", processes=2, chunk_characters=300)
    assert alone.fingerprint == together.fingerprint
    assert texts_of(alone, byte_tokenizer) == texts_of(together, byte_tokenizer)
    assert len(alone.shards) == len(together.shards) > 3


_KILLED = """
import os, signal, sys
from mlxlm.data import building
from mlxlm.tokenizers import load_tokenizer
write, count = building.write_bytes_atomic, 0
def dying(path, data):
    global count
    write(path, data)
    count += 1
    if count == 7:  # the fourth shard has its tokens, but no index yet
        os.kill(os.getpid(), signal.SIGKILL)
building.write_bytes_atomic = dying
building.build_store(sys.argv[1], load_tokenizer(sys.argv[2]), sys.argv[3], processes=1, chunk_characters=100)
"""


def test_a_killed_build_goes_on_at_the_missing_shards(tmp_path, byte_tokenizer, monkeypatch):
    source = write_rows(tmp_path / "a.jsonl", [f"document {number} " * 5 for number in range(20)])
    byte_tokenizer.save(tmp_path / "tokenizer")
    arguments = [str(source), str(tmp_path / "tokenizer"), str(tmp_path / "cache")]
    root = str(Path(__file__).parents[2])
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments], env={**os.environ, "PYTHONPATH": root}, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    before = shards(tmp_path / "cache")
    assert len(before) == 7
    made = []
    write = _Worker.write
    monkeypatch.setattr(_Worker, "write", lambda self, number, texts: made.append(number) or write(self, number, texts))
    resumed = build_store(source, byte_tokenizer, tmp_path / "cache", chunk_characters=100)
    whole = build_store(source, byte_tokenizer, tmp_path / "other", chunk_characters=100)
    assert made[0] == 3
    assert len(made) == 2 * len(whole.shards) - 3
    after = shards(tmp_path / "cache")
    assert all(after[name] == before[name] for name in before if int(name[6:11]) < 3)
    assert resumed.fingerprint == whole.fingerprint
    assert texts_of(resumed, byte_tokenizer) == texts_of(whole, byte_tokenizer)


def test_what_is_in_the_cache_is_used_until_the_source_changes(tmp_path, byte_tokenizer, monkeypatch):
    source = tmp_path / "a.txt"
    source.write_text("first")
    calls = []
    write = _Worker.write
    monkeypatch.setattr(_Worker, "write", lambda self, *given: calls.append(1) or write(self, *given))

    def build():
        calls.clear()
        return texts_of(build_store(source, byte_tokenizer, tmp_path / "cache"), byte_tokenizer), len(calls)

    assert build() == (["first"], 1)
    assert build() == (["first"], 0)
    os.utime(source, ns=(1, 1))  # touched, but the same content
    assert build() == (["first"], 0)
    source.write_text("other")  # as long as before
    assert build() == (["other"], 1)
    assert build() == (["other"], 0)


def test_a_damaged_shard_is_built_again(tmp_path, byte_tokenizer):
    source = write_rows(tmp_path / "a.jsonl", ["one", "two"])
    store = build_store(source, byte_tokenizer, tmp_path / "cache")
    store.shards[0].write_bytes(b"12")
    with pytest.raises(DataError, match="holds 1 tokens, its index says 8"):
        TokenStore.open(store.shards, store.dtype)
    again = build_store(source, byte_tokenizer, tmp_path / "cache")
    assert texts_of(again, byte_tokenizer) == ["one", "two"]


def test_another_tokenizer_has_another_store(tmp_path, byte_tokenizer):
    from mlxlm.tokenizers.training import train_tokenizer

    source = write_rows(tmp_path / "a.jsonl", ["aaaa bbbb aaaa bbbb"])
    other = train_tokenizer(lambda: ["aaaa bbbb"] * 9, tmp_path / "t", kind="byte-level-bpe", vocab_size=262)
    bytes_store = build_store(source, byte_tokenizer, tmp_path / "cache")
    other_store = build_store(source, other, tmp_path / "cache")
    assert other_store.num_tokens < bytes_store.num_tokens
    assert texts_of(bytes_store, byte_tokenizer) == texts_of(other_store, other)


def test_the_split_of_a_document_stays_when_others_are_added(tmp_path, byte_tokenizer):
    texts = [f"document {number}" for number in range(400)]
    sides = {}
    for count in (200, 400):
        source = write_rows(tmp_path / f"{count}.jsonl", texts[400 - count :])
        train, valid = prepare(source, byte_tokenizer, tmp_path / "cache", valid_fraction=0.25, seed=3)
        sides[count] = (set(texts_of(train, byte_tokenizer)), set(texts_of(valid, byte_tokenizer)))
        assert len(train) + len(valid) == count
    assert sides[200][0] < sides[400][0]
    assert sides[200][1] < sides[400][1]
    assert 70 <= len(sides[400][1]) <= 130  # 100 expected, 3.4 standard deviations
    _, other = prepare(source, byte_tokenizer, tmp_path / "cache", valid_fraction=0.25, seed=4)
    assert set(texts_of(other, byte_tokenizer)) != sides[400][1]


def test_sources_without_weights_are_one_store_and_with_weights_a_mixture(tmp_path, byte_tokenizer):
    files = [write_rows(tmp_path / f"{name}.jsonl", [name * 3, name * 5]) for name in "ab"]
    train, valid = prepare(files, byte_tokenizer, tmp_path / "cache")
    assert texts_of(train, byte_tokenizer) == ["aaa", "aaaaa", "bbb", "bbbbb"]
    assert len(valid) == 0
    weighted = [{"location": path, "weight": weight} for path, weight in zip(files, (3, 1), strict=True)]
    train, _ = prepare(weighted, byte_tokenizer, tmp_path / "cache")
    assert isinstance(train, Mixture)
    assert train.weights == (0.75, 0.25)
    with pytest.raises(UsageError, match=r"b\.jsonl has no weight"):
        prepare([weighted[0], files[1]], byte_tokenizer, tmp_path / "cache")


def test_no_documents_and_impossible_settings_are_refused(tmp_path, byte_tokenizer):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"the data has no text: .*empty\.txt"):
        prepare(tmp_path / "empty.txt", byte_tokenizer, tmp_path / "cache")
    (tmp_path / "one.txt").write_text("a single text")
    with pytest.raises(DataError, match="no document is left for training: the sources have 1, all of them for valid"):
        prepare(tmp_path / "one.txt", byte_tokenizer, tmp_path / "cache", valid_fraction=0.999999)
    with pytest.raises(UsageError, match="no data"):
        prepare([], byte_tokenizer, tmp_path / "cache")
    with pytest.raises(UsageError, match=r"valid_fraction 1\.0"):
        prepare(tmp_path / "empty.txt", byte_tokenizer, tmp_path / "cache", valid_fraction=1.0)
    with pytest.raises(UsageError, match="processes 0"):
        prepare(tmp_path / "empty.txt", byte_tokenizer, tmp_path / "cache", processes=0)
