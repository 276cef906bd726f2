"""Rows that the library `datasets` reads: with the real library where it is installed, and what is said without it."""

from __future__ import annotations

import json
import sys

import pytest

from mlxlm.data import read_split, read_splits
from mlxlm.errors import DataError, UsageError

library = pytest.mark.library


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with its cache in the test's folder and no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    return found


def table(datasets, count=10):
    """Texts with labels that are numbers of names."""
    rows = [{"sentence": f"text {number}", "label": number % 2} for number in range(count)]
    return datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["bad", "good"]))


def values(rows):
    return [row for _, row in rows.rows]


@library
@pytest.mark.parametrize("dictionary", [False, True])
def test_a_folder_that_the_library_wrote_is_read_with_names_of_classes(datasets, tmp_path, dictionary):
    made = table(datasets)
    made = datasets.DatasetDict({"train": made, "validation": table(datasets, 3)}) if dictionary else made
    made.save_to_disk(str(tmp_path / "saved"))
    found = read_splits(tmp_path / "saved", {"text": "sentence"})
    assert list(found) == (["train", "valid"] if dictionary else ["train"])
    assert values(found["train"])[:2] == [{"label": "bad", "text": "text 0"}, {"label": "good", "text": "text 1"}]
    assert found["train"].rows[3][0] == "train, row 3"


@library
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("train[:2]", {"train": [0, 1]}),
        ("train[80%:]", {"train": [8, 9]}),
        ("train[:1]+test[1:]", {"train": [0, 101, 102]}),
        ("train=train[2:4],valid=train[9:],test=test[:1]", {"train": [2, 3], "valid": [9], "test": [100]}),
    ],
)
def test_splits_are_chosen_in_the_words_of_the_library(datasets, tmp_path, wanted, expected):
    first, second = ([{"text": f"{number}"} for number in numbers] for numbers in (range(10), range(100, 103)))
    made = datasets.DatasetDict(train=datasets.Dataset.from_list(first), test=datasets.Dataset.from_list(second))
    made.save_to_disk(str(tmp_path / "saved"))
    found = read_splits(f"{tmp_path / 'saved'}:{wanted}")
    assert {name: [int(row["text"]) for row in values(rows)] for name, rows in found.items()} == expected


@library
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("trian", "no split 'trian'; did you mean 'train'"),
        ("train[5:5]", "is empty"),
        ("train[:2],test", "expected one as train"),
        ("best=train", "expected one as train"),
        ("train[:200%]", "Percent slice boundaries .*; its splits: train"),
        ("train[5", "Unrecognized instruction format"),
    ],
)
def test_splits_that_are_wrong_are_told(datasets, tmp_path, wanted, message):
    table(datasets).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match=message):
        read_splits(f"{tmp_path / 'saved'}:{wanted}")


@library
@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "json"])
def test_tables_are_read_alone_from_a_folder_and_by_the_name_of_what_reads_them(datasets, tmp_path, kind):
    folder = tmp_path / "tables"
    folder.mkdir()
    rows = [{"text": f"a, {number}\ttab", "label": "odd" if number % 2 else "even"} for number in range(4)]
    for name, part in (("train", rows), ("dev", rows[:1])):
        made = datasets.Dataset.from_list(part)
        file = str(folder / f"{name}.{kind}")
        if kind == "parquet":
            made.to_parquet(file)
        elif kind == "json":
            (folder / f"{name}.json").write_text(json.dumps(part))
        else:
            made.to_csv(file, sep="\t" if kind == "tsv" else ",")
    assert values(read_split(folder / f"train.{kind}")) == rows
    found = read_splits(folder)
    assert {name: values(part) for name, part in found.items()} == {"train": rows, "valid": rows[:1]}
    assert read_split(folder, "valid").format == "classification"
    if kind != "tsv":
        (folder / f"train.{kind}").rename(folder / "part.data")
        assert values(read_splits(f"{kind}:{folder / 'part.*'}:train[1:]")["train"]) == rows[1:]


@library
def test_gaps_that_a_table_fills_in_are_left_out(datasets, tmp_path):
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
    chat = [{"role": "user", "content": "hello"}, called]
    rows = [{"messages": chat, "tools": None}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (row,) = values(read_splits(tmp_path / "saved")["train"])
    assert row == {"messages": [chat[0], {"role": "assistant", "tool_calls": called["tool_calls"]}]}


@library
def test_lists_of_classes_become_names_and_no_label_is_an_error(datasets, tmp_path):
    kinds = {
        "tokens": datasets.List(datasets.Value("string")),
        "tags": datasets.List(datasets.ClassLabel(names=["O", "B"])),
    }
    made = datasets.Dataset.from_dict({"tokens": [["in", "Rome"]], "tags": [[0, 1]]}, datasets.Features(kinds))
    made.save_to_disk(str(tmp_path / "tagged"))
    found = read_splits(tmp_path / "tagged", {"labels": "tags"})["train"]
    assert (found.format, values(found)) == ("tagging", [{"tokens": ["in", "Rome"], "labels": ["O", "B"]}])
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    made = datasets.Dataset.from_dict({"text": ["x"], "label": [-1]}, datasets.Features(kinds))
    made.save_to_disk(str(tmp_path / "hidden"))
    with pytest.raises(DataError, match="row 0: label is -1, which stands for no label"):
        read_splits(tmp_path / "hidden")


@library
def test_what_the_library_refuses_is_one_line(datasets, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    for data in (str(tmp_path / "broken.parquet"), "hub:nobody/nothing", "csv:" + str(tmp_path / "*.none")):
        with pytest.raises(DataError, match="can't be loaded") as error:
            read_splits(data)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data", ["hub:owner/name", "hf:owner/name/config:train[:10%]", "owner/name:train", "csv:part.*", "table.parquet"]
)
def test_without_the_library_one_line_says_what_to_install(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_splits(data)


def test_a_path_in_a_folder_that_is_there_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="data/rows is no file and no folder"):
        read_splits("data/rows")


def test_a_name_of_the_hub_that_is_none_is_told():
    with pytest.raises(UsageError, match="names no data set; expected hub:OWNER/NAME or"):
        read_splits("hub:a/b/c/d")
