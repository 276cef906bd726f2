"""PyTorch files: what torch.save wrote gives its values, and no pickle is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from torch_pickles import archive, state, storage, tensor

from mlxlm.checkpoint import open_checkpoint, open_safetensors, open_torch
from mlxlm.checkpoint.pickles import Refused, StridedTensor, read_pickle
from mlxlm.errors import CheckpointError, ModelNotFoundError

FIXTURES = Path(__file__).parent.parent / "fixtures" / "torch"


def same(found: mx.array, expected: mx.array) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and bool(mx.array_equal(found, expected))


class Call:
    """Pickles as a call of a function, as an attacker's object does."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ---------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", ["archive.bin", "legacy.bin", "trainer.ckpt", "trainer-legacy.pt"])
def test_what_torch_saved_has_its_values(name):
    expected = open_safetensors(FIXTURES / "expected.safetensors").load()
    checkpoint = open_torch(FIXTURES / name)
    arrays = checkpoint.load()
    prefix = "trainer." if name.startswith("trainer") else ""
    wanted = {key.removeprefix(prefix) for key in expected if key.startswith("trainer.") == bool(prefix)}
    wanted -= {key for key in wanted if key.startswith("small.") and name == "legacy.bin"}
    assert set(arrays) == wanted
    for key, array in arrays.items():
        assert same(array, expected[prefix + key]), key
        assert checkpoint.tensors[key].shape == array.shape
    assert open_checkpoint(FIXTURES / name).tensors == checkpoint.tensors


def test_a_file_by_hand_has_its_values_and_can_be_big_endian(tmp_path):
    values = np.arange(6, dtype=">f4")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("x/data.pkl", state(a=tensor(), b=tensor((2,), (2,), 1)))
        file.writestr("x/data/0", values.tobytes())
        file.writestr("x/byteorder", "big")
    arrays = open_torch(tmp_path / "x.pt").load()
    assert arrays["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["b"].tolist() == [1, 3]


def test_shards_are_found_by_their_index_and_must_agree_with_it(tmp_path):
    archive(tmp_path / "one.bin", state(a=tensor()))
    archive(tmp_path / "two.bin", state(b=tensor()))
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    assert sorted(open_checkpoint(tmp_path).load()) == ["a", "b"]
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin", "c": "two.bin"}}))
    with pytest.raises(CheckpointError, match="1 listed but in no shard: c"):
        open_torch(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "../two.bin"}}))
    with pytest.raises(CheckpointError, match="lies outside the directory"):
        open_torch(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "three.bin"}}))
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards: three\.bin"):
        open_torch(tmp_path)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    archive(tmp_path / "secret.bin", state(a=tensor()))
    (tmp_path / "model").mkdir()
    os.symlink(tmp_path / "secret.bin", tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="lies outside the directory"):
        open_torch(tmp_path / "model")


def test_without_a_usual_name_the_only_file_is_taken(tmp_path):
    archive(tmp_path / "weights.pth", state(a=tensor()))
    (tmp_path / "training_args.bin").write_bytes(b"")
    (tmp_path / "optimizer.pt").write_bytes(b"")
    assert list(open_torch(tmp_path).tensors) == ["a"]
    archive(tmp_path / "more.pth", state(b=tensor()))
    with pytest.raises(CheckpointError, match=r"several PyTorch files.*more\.pth, weights\.pth"):
        open_torch(tmp_path)
    with pytest.raises(ModelNotFoundError):
        open_torch(tmp_path / "none")


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(os.system, "touch marker"), r"(posix|nt)\.system"),
        (Call(eval, "open('marker', 'w')"), r"(builtins|__builtin__)\.eval"),
        (Call(exec, "open('marker', 'w')"), r"(builtins|__builtin__)\.exec"),
        (Call(open, "marker", "w"), r"(io|_io)\.open"),
        (Call(getattr, "", "upper"), r"(builtins|__builtin__)\.getattr"),
    ],
    ids=["system", "eval", "exec", "open", "getattr"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_no_code_is_run_and_the_call_is_named(tmp_path, monkeypatch, call, name, protocol):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "x.bin", pickle.dumps({"a": call}, protocol=protocol))
    with pytest.raises(CheckpointError, match=rf"(refers to {name}|uses ).*nothing in it was run"):
        open_torch(tmp_path / "x.bin")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(call, protocol=max(protocol, 2)))
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        open_torch(tmp_path / "bare.bin")
    assert not (tmp_path / "marker").exists()


def test_a_whole_module_is_refused_by_its_class():
    with pytest.raises(CheckpointError, match=r"refers to torch\.nn\.modules\.container\.Sequential"):
        open_torch(FIXTURES / "module.pt")


GOOD = state(a=tensor())
BAD = {
    "empty": (b"", "ends with 0 values|malformed"),
    "cut": (GOOD[:-9], "malformed"),
    "no stop": (GOOD[:-1], "malformed"),
    "a number": (b"\x80\x02K\x01.", "holds a int, not a dict"),
    "a number among tensors": (state(a=tensor(), b=b"K\x01"), r"1 of its 2 entries are no named tensors: b \(int\)"),
    "beyond the storage": (state(a=tensor((7,), (1,))), "'a' reaches beyond its storage"),
    "offset beyond": (state(a=tensor(offset=1)), "reaches beyond"),
    "repeated without end": (state(a=tensor((2**40,), (0,))), "repeats a storage of 24 bytes"),
    "negative stride": (state(a=tensor((2,), (-1,))), "no small list of whole numbers"),
    "strides missing": (state(a=tensor((2, 3), (1,))), "2 dimensions has 1 strides"),
    "many dimensions": (state(a=tensor((1,) * 99, (1,) * 99)), "no small list"),
    "storage too short": (state(a=tensor(held=storage(count=7))), "has 24 bytes of 28"),
    "storage of another name": (state(a=tensor(held=storage("1"))), "has no storage '1'"),
    "storage in two ways": (state(a=tensor(), b=tensor(held=storage(count=5))), "in two ways"),
    "unknown storage": (state(a=tensor(held=storage(kind="torch.QInt8Storage"))), "refers to torch.QInt8Storage"),
    "sparse": (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "_rebuild_sparse_tensor"),
    "nested load": (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "_load_from_bytes"),
    "huge number": (b"\x80\x02\x8b" + struct.pack("<I", 4000) + bytes(3999) + b"\x01.", r"number of \d+ bits"),
    "claimed text": (b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"abc", "more than 64 MB|malformed"),
    "claimed bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc", "uses|more than|malformed"),
    "memo from nowhere": (b"\x80\x02h\x07.", "malformed"),
    "build of a number": (b"\x80\x02K\x01}b.", "sets attributes of something other"),
    "object": (b"\x80\x02c__main__\nX\n)\x81.", "refers to __main__.X"),
    "extension code": (b"\x80\x02\x82\x01.", "uses EXT1"),
    "stack underflow": (b"\x80\x02R.", "malformed"),
    "mark missing": (b"\x80\x02K\x01t.", "malformed"),
    "call of a dtype": (b"\x80\x02ctorch\nfloat32\n)R.", "calls torch.float32"),
    "key that is a tensor": (b"\x80\x02}" + tensor() + b"K\x01s.", "key of type StridedTensor"),
    "another persistent id": (b"\x80\x02K\x01Q.", "no storage"),
    "not an escape": (b"S'\\q'\n.", "malformed"),
    "not utf-8": (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "malformed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pickle_is_refused_with_its_reason(tmp_path, case):
    content, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_torch(archive(tmp_path / "made.bin", content))
    assert "made.bin" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bombs_are_stopped_early(monkeypatch):
    nested = b"\x80\x02" + b"(" * 20_000 + b"t" * 20_000 + b"."
    assert isinstance(read_pickle(io.BytesIO(nested)), tuple)
    doubled = b"\x80\x02]" + b"q\x00(h\x00h\x00e" * 50 + b"."  # each list holds itself: no growth
    assert len(read_pickle(io.BytesIO(doubled))) == 100
    monkeypatch.setattr("mlxlm.checkpoint.pickles._MAX_OPCODES", 1000)
    with pytest.raises(Refused, match="more than 1000 opcodes"):
        read_pickle(io.BytesIO(b"\x80\x02" + b"N" * 3000))


def test_deep_nesting_is_refused():
    rebuild, kind = b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\nTensor\n"
    deep = b"\x80\x02" + rebuild + (b"(" + rebuild + kind) * 5000 + b"(t" + b"Nt" * 5000 + b"R."
    with pytest.raises(Refused):
        read_pickle(io.BytesIO(deep))


def test_a_version_that_is_no_number_is_not_shown(tmp_path):
    nested = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + nested + pickle.dumps({}, 2) * 2 + pickle.dumps([], 2))
    with pytest.raises(CheckpointError, match="of version a list"):
        open_torch(path)


def test_names_in_a_zip_archive_that_are_no_text_are_refused(tmp_path):
    path = archive(tmp_path / "a.bin", GOOD)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/é", b"")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(CheckpointError, match="damaged zip archive"):
        open_torch(path)


@pytest.mark.parametrize("cut", range(0, 2800, 97))
def test_truncated_files_are_refused(tmp_path, cut):
    for name in ("legacy.bin", "archive.bin"):
        content = (FIXTURES / name).read_bytes()
        (tmp_path / name).write_bytes(content[:cut])
        with pytest.raises(CheckpointError):
            open_torch(tmp_path / name)


def test_archives_that_torch_never_writes_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        open_torch(archive(tmp_path / "a.bin", GOOD, compress=True))
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as file:
        file.writestr("x/other", b"")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        open_torch(tmp_path / "b.bin")
    (tmp_path / "c.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_torch(tmp_path / "c.bin")
    (tmp_path / "d.bin").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="neither a zip archive nor a pickle"):
        open_torch(tmp_path / "d.bin")


def test_a_huge_directory_is_refused_before_it_is_read(tmp_path):
    path = archive(tmp_path / "a.bin", GOOD)
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\5\6") + 12
    content[place : place + 4] = struct.pack("<I", 2**31)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="claims a directory of 2147483648 bytes"):
        open_torch(path)


def test_a_tensor_is_only_described_until_it_is_asked_for():
    value = read_pickle(io.BytesIO(GOOD))["a"]
    assert isinstance(value, StridedTensor)
    assert (value.shape, value.strides, value.storage.key) == ((2, 3), (3, 1), "0")
