"""Writing safetensors: round trips, the shard layout, and what is left when a write fails."""

from __future__ import annotations

import json
import os
import random
import struct

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.checkpoint import files, open_safetensors, save_safetensors
from mlxlm.errors import CheckpointError

DTYPES = ["bool_", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
DTYPES += ["float16", "bfloat16", "float32", "complex64"]


def raw(array: mx.array) -> bytes:
    """The array's bytes in row-major order, by way of numpy."""
    if array.dtype == mx.bfloat16:
        return (np.array(array.astype(mx.float32)).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return np.array(array).tobytes()


def sample() -> dict[str, mx.array]:
    mx.random.seed(3)
    arrays = {f"layer.{name}": mx.random.uniform(0, 100, (3, 5)).astype(getattr(mx, name)) for name in DTYPES}
    arrays["scalar"] = mx.array(2.5, dtype=mx.bfloat16)
    arrays["empty"] = mx.zeros((0, 7))
    arrays["żółw ☃ 日本"] = mx.arange(4)
    arrays["transposed"] = mx.arange(12, dtype=mx.float32).reshape(3, 4).T
    arrays["broadcast"] = mx.broadcast_to(mx.array([1.0, 2.0]), (3, 2))
    arrays["slice"] = mx.arange(20)[3::4]
    return arrays


def header_of(path) -> tuple[dict, int]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), length


def listing(directory) -> list[str]:
    return sorted(os.listdir(directory))


def is_temporary(name: str) -> bool:
    return name.startswith(".")


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 200, 1], ids=["one file", "shards", "a shard a tensor"])
def test_a_round_trip_gives_the_same_bytes(tmp_path, max_shard_bytes):
    arrays = sample()
    written = save_safetensors(tmp_path / "new" / "folder", arrays, max_shard_bytes=max_shard_bytes)
    loaded = open_safetensors(tmp_path / "new" / "folder").load()
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape), name
        assert raw(loaded[name]) == raw(array), name
    assert len(written) == {5 * 10**9: 1, 1: len(arrays)}.get(max_shard_bytes, len(written))
    for path in written:
        assert mx.load(str(path)).keys() <= arrays.keys()  # MLX's own reader agrees that the file is whole


def test_one_file_has_the_pt_format_and_aligned_tensors(tmp_path):
    (path,) = save_safetensors(tmp_path, {"odd": mx.zeros(3, mx.uint8), "wide": mx.zeros(2, mx.int64)})
    header, length = header_of(path)
    assert path.name == "model.safetensors"
    assert listing(tmp_path) == ["model.safetensors"]
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    assert all(entry["data_offsets"][0] % 8 == 0 for entry in header.values())


def test_shards_have_hugging_faces_names_and_index(tmp_path):
    arrays = {"c": mx.zeros((10, 10)), "a": mx.zeros((5, 10), mx.float16), "b": mx.zeros(300)}
    written = save_safetensors(tmp_path, arrays, max_shard_bytes=500, metadata={"format": "mlx"}, total_parameters=42)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [path.name for path in written] == names
    assert listing(tmp_path) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 400 + 100 + 1200, "total_parameters": 42},
        "weight_map": {"a": names[0], "b": names[1], "c": names[0]},
    }
    assert list(index["weight_map"]) == ["a", "b", "c"]
    assert open_safetensors(tmp_path).metadata == {"format": "mlx"}


def test_parameters_are_counted_unless_given(tmp_path):
    save_safetensors(tmp_path, {"a": mx.zeros((10, 10)), "b": mx.zeros(7)}, max_shard_bytes=1)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_parameters"] == 107


def test_an_array_under_two_names_is_written_under_both(tmp_path):
    shared = mx.arange(3)
    save_safetensors(tmp_path, {"embedding": shared, "head": shared})
    loaded = open_safetensors(tmp_path).load()
    assert loaded["embedding"].tolist() == loaded["head"].tolist() == [0, 1, 2]


def test_a_generator_of_lazy_arrays_needs_the_memory_of_one_shard(tmp_path):
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pairs = ((f"x{number}", mx.full((256, 1024), float(number))) for number in range(12))
    save_safetensors(tmp_path, pairs, max_shard_bytes=2 * 2**20)
    assert mx.get_peak_memory() - before < 4 * 2**20  # of 12 MiB
    assert float(open_safetensors(tmp_path).load()["x11"].mean()) == 11


def test_no_tensors_make_an_empty_file(tmp_path):
    save_safetensors(tmp_path, {})
    assert open_safetensors(tmp_path).load() == {}


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("second", [1, 2, 3])
def test_a_later_save_replaces_an_earlier_one_of_any_number_of_shards(tmp_path, first, second):
    (tmp_path / "adapters.safetensors").write_bytes(b"not ours")
    (tmp_path / "config.json").write_text("{}")
    for number, shards in enumerate((first, second)):
        arrays = {f"x{name}": mx.full((25,), float(10 * number + name)) for name in range(shards)}
        save_safetensors(tmp_path, arrays, max_shard_bytes=100)
    assert {name: float(array[0]) for name, array in open_safetensors(tmp_path).load().items()} == {
        f"x{name}": 10.0 + name for name in range(second)
    }
    assert len([name for name in listing(tmp_path) if name.startswith("model")]) == (
        second if second == 1 else second + 1
    )
    assert (tmp_path / "adapters.safetensors").read_bytes() == b"not ours"
    assert not any(map(is_temporary, listing(tmp_path)))


def test_arrays_loaded_lazily_can_be_saved_over_their_own_files(tmp_path):
    arrays = sample()
    save_safetensors(tmp_path, arrays, max_shard_bytes=150)
    lazy = open_safetensors(tmp_path).load()
    save_safetensors(tmp_path, {name: lazy[name] for name in reversed(lazy)}, max_shard_bytes=150)
    again = open_safetensors(tmp_path).load()
    assert {name: raw(array) for name, array in again.items()} == {name: raw(array) for name, array in arrays.items()}


# ---------------------------------------------------------------------------------------------------- failures


def no_space(*_):
    raise OSError(28, "No space left on device")


class FullDisk:
    """`os.fsync` of a disk that is full after some files."""

    def __init__(self, files: int) -> None:
        self.left = files

    def __call__(self, descriptor: int) -> None:
        if self.left == 0:
            no_space()
        self.left -= 1


@pytest.mark.parametrize("fits", [0, 1, 2], ids=["first shard", "second shard", "index"])
def test_a_full_disk_leaves_the_earlier_save_and_nothing_else(tmp_path, monkeypatch, fits):
    old = {"a": mx.arange(25), "b": mx.arange(25) + 100}
    save_safetensors(tmp_path, old, max_shard_bytes=100)
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    monkeypatch.setattr(files.os, "fsync", FullDisk(fits))
    with pytest.raises(CheckpointError, match="No space left on device; what was there before is unchanged"):
        save_safetensors(tmp_path, {"a": mx.zeros(25), "b": mx.zeros(25)}, max_shard_bytes=100)
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before


def test_an_error_in_the_callers_generator_leaves_the_earlier_save(tmp_path):
    save_safetensors(tmp_path, {"a": mx.arange(5)})

    def pairs():
        yield "a", mx.zeros(5)
        yield "b", mx.zeros(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_safetensors(tmp_path, pairs(), max_shard_bytes=1)
    assert listing(tmp_path) == ["model.safetensors"]
    assert open_safetensors(tmp_path).load()["a"].tolist() == [0, 1, 2, 3, 4]


def test_stopped_amid_the_renames_the_mixture_is_not_taken_for_a_model(tmp_path, monkeypatch):
    save_safetensors(tmp_path, {"a": mx.zeros(25), "b": mx.zeros(25)}, max_shard_bytes=100)
    replace, calls = os.replace, []

    def stop_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_second)
    with pytest.raises(CheckpointError, match=r"replaced only in part.*save again"):
        save_safetensors(tmp_path, {"a": mx.ones(25), "b": mx.ones(25)}, max_shard_bytes=100)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="a save was interrupted"):
        open_safetensors(tmp_path)
    save_safetensors(tmp_path, {"a": mx.ones(25), "b": mx.ones(25)}, max_shard_bytes=100)
    assert float(open_safetensors(tmp_path).load()["b"].sum()) == 25
    assert not any(map(is_temporary, listing(tmp_path)))


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't write"):
        save_safetensors(tmp_path / "file", {"a": mx.zeros(1)})


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'a': the name is taken"):
        save_safetensors(tmp_path, iter([("a", mx.zeros(1)), ("a", mx.zeros(1))]))
    with pytest.raises(CheckpointError, match="'__metadata__'"):
        save_safetensors(tmp_path, {"__metadata__": mx.zeros(1)})
    with pytest.raises(CheckpointError, match="metadata of safetensors are strings"):
        save_safetensors(tmp_path, {"a": mx.zeros(1)}, metadata={"step": 3})
    with mx.stream(mx.cpu), pytest.raises(CheckpointError, match=r"no type for .*float64"):
        save_safetensors(tmp_path, {"a": mx.zeros(1, mx.float64)})
    assert listing(tmp_path) == []


def test_random_sets_of_tensors_round_trip(tmp_path):
    rng = random.Random(11)
    for _ in range(15):
        arrays = {}
        for number in range(rng.randint(1, 8)):
            shape = tuple(rng.randint(0, 5) for _ in range(rng.randint(0, 4)))
            dtype = getattr(mx, rng.choice(DTYPES))
            arrays[f"t{number}"] = mx.array(np.random.default_rng(number).integers(0, 99, shape)).astype(dtype)
        save_safetensors(tmp_path, arrays, max_shard_bytes=rng.randint(1, 400))
        loaded = open_safetensors(tmp_path).load()
        assert {name: (array.shape, raw(array)) for name, array in loaded.items()} == {
            name: (array.shape, raw(array)) for name, array in arrays.items()
        }
