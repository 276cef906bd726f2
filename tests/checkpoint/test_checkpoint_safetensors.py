"""Reading safetensors: against files put together by hand, byte by byte."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.checkpoint import Checkpoint, open_safetensors
from mlxlm.errors import CheckpointError, MlxlmError, ModelNotFoundError


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_file(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_file(path: Path, arrays: dict[str, np.ndarray], metadata: dict | None = None) -> None:
    header: dict = {"__metadata__": metadata} if metadata is not None else {}
    data = b""
    for name, array in arrays.items():
        dtype = {"f": "F", "i": "I", "u": "U"}[array.dtype.kind] + str(8 * array.itemsize)
        header[name] = entry(dtype, list(array.shape), len(data), len(data) + array.nbytes)
        data += array.tobytes()
    path.write_bytes(raw_file(header, data))


def arange(start: int, count: int) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.float32)


GOOD = raw_file({"a": entry("F32", [2, 3], 0, 24), "b": entry("U8", [5], 24, 29)}, arange(0, 6).tobytes() + b"12345")

# Bytes of three values in every dtype, and what they are as numpy or plain numbers.
VALUES = {
    "BOOL": (b"\x01\x00\x01", "bool", [True, False, True]),
    "U8": (b"\x01\x02\xff", "uint8", [1, 2, 255]),
    "I8": (b"\x01\x02\xff", "int8", [1, 2, -1]),
    "U16": (struct.pack("<3H", 1, 2, 65535), "uint16", [1, 2, 65535]),
    "I16": (struct.pack("<3h", 1, 2, -3), "int16", [1, 2, -3]),
    "U32": (struct.pack("<3I", 1, 2, 2**32 - 1), "uint32", [1, 2, 2**32 - 1]),
    "I32": (struct.pack("<3i", 1, 2, -3), "int32", [1, 2, -3]),
    "U64": (struct.pack("<3Q", 1, 2, 2**40), "uint64", [1, 2, 2**40]),
    "I64": (struct.pack("<3q", 1, 2, -(2**40)), "int64", [1, 2, -(2**40)]),
    "F16": (struct.pack("<3e", 1, -0.5, 65504), "float16", [1, -0.5, 65504]),
    "BF16": (struct.pack("<3H", 0x3F80, 0xBF00, 0x7F00), "bfloat16", [1, -0.5, 2.0**127]),
    "F32": (struct.pack("<3f", 1, -0.5, 2.0**127), "float32", [1, -0.5, 2.0**127]),
    "C64": (struct.pack("<6f", 1, 2, 3, 4, 5, 6), "complex64", [1 + 2j, 3 + 4j, 5 + 6j]),
}


@pytest.mark.parametrize("dtype", VALUES)
def test_every_dtype_is_read_as_it_is(tmp_path, dtype):
    data, name, expected = VALUES[dtype]
    (tmp_path / "x.safetensors").write_bytes(raw_file({"a": entry(dtype, [3], 0, len(data))}, data))
    checkpoint = open_safetensors(tmp_path / "x.safetensors")
    info = checkpoint.tensors["a"]
    assert (info.dtype, info.shape, info.nbytes, info.quantization) == (name, (3,), len(data), None)
    array = checkpoint.load()["a"]
    assert str(array.dtype) == f"mlx.core.{name}"
    assert array.tolist() == expected


@pytest.mark.parametrize(
    ("dtype", "data", "expected"),
    [
        ("F64", struct.pack("<2d", 0.1, 1e300), [np.float32(0.1), np.inf]),
        ("F8_E4M3", b"\x01\xfe", [2.0**-9, -448.0]),
        ("F8_E5M2", b"\x7b\xfc", [57344.0, -np.inf]),
        ("F8_E4M3FNUZ", b"\x7f\x81", [240.0, -(2.0**-10)]),
        ("F8_E8M0", b"\x00\x80", [2.0**-127, 2.0]),
    ],
)
def test_what_mlx_has_no_type_for_comes_as_float32(tmp_path, dtype, data, expected):
    end = len(data)
    header = {"a": entry(dtype, [2], 0, end), "b": entry("BF16", [2, 1], end, end + 4)}
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, data + b"\x80\x3f\x00\xc0"))
    arrays = open_safetensors(tmp_path).load()
    assert arrays["a"].dtype == mx.float32
    assert np.array_equal(np.array(arrays["a"]), np.array(expected, np.float32))
    assert (arrays["b"].dtype, arrays["b"].tolist()) == (mx.bfloat16, [[1.0], [-2.0]])


def test_a_dtype_that_cannot_be_read_is_listed_and_refused_by_load(tmp_path):
    header = {"a": entry("F4", [2], 0, 1), "b": entry("F32", [], 1, 5)}
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, bytes(5)))
    checkpoint = open_safetensors(tmp_path)
    assert checkpoint.tensors["a"].nbytes == 1
    with pytest.raises(CheckpointError, match=r"1 of float4_e2m1 \(such as a\).*float32"):
        checkpoint.load()
    assert checkpoint.load(["b"])["b"].item() == 0


def test_scalars_empty_tensors_unicode_names_and_metadata(tmp_path):
    arrays = {"scalar": np.float32(7).reshape(()), "leer ☃.weight": np.empty((0, 4), np.float32), "z": arange(3, 2)}
    write_file(tmp_path / "x.safetensors", arrays, metadata={"format": "pt", "ż": "ó"})
    checkpoint = open_safetensors(tmp_path / "x.safetensors")
    assert checkpoint.metadata == {"format": "pt", "ż": "ó"}
    assert checkpoint.nbytes == 12
    loaded = checkpoint.load()
    assert loaded["scalar"].shape == ()
    assert loaded["scalar"].item() == 7
    assert loaded["leer ☃.weight"].shape == (0, 4)
    assert loaded["z"].tolist() == [3, 4]


def test_a_file_without_tensors_is_a_checkpoint_without_tensors(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(raw_file(b"{}      ", b""))
    assert open_safetensors(tmp_path / "x.safetensors").load() == {}


def test_load_takes_names_in_their_order(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    checkpoint = open_safetensors(tmp_path / "x.safetensors")
    assert list(checkpoint.tensors) == ["a", "b"]
    assert list(checkpoint.load(["b", "a"])) == ["b", "a"]
    assert list(checkpoint.load(["b", "b"])) == ["b"]
    with pytest.raises(CheckpointError, match=r"no tensor 'layer\.wieght'"):
        checkpoint.load(["layer.wieght"])


def test_loaded_arrays_take_no_memory_until_they_are_evaluated(tmp_path):
    write_file(tmp_path / "x.safetensors", {"a": np.ones((1024, 1024), np.float32), "b": np.ones(4, np.float32)})
    checkpoint = open_safetensors(tmp_path / "x.safetensors")
    before = mx.get_active_memory()
    arrays = checkpoint.load()
    assert mx.get_active_memory() - before < 100_000
    mx.eval(arrays["a"])
    assert mx.get_active_memory() - before >= 4 * 2**20


# ---------------------------------------------------------------------------------------------------- bad files

BAD = {
    "empty": (b"", "not a safetensors file"),
    "shorter than its length": (GOOD[:7], "not a safetensors file"),
    "length beyond the file": (GOOD[:30], "bytes of its header are missing"),
    "huge length": (struct.pack("<Q", 2**62) + GOOD[8:], "claims a header of"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "not json": (raw_file(b"{nonsense}", b""), "malformed header"),
    "not an object": (raw_file(b"[]", b""), "doesn't start with '{'"),
    "padded in front": (raw_file(b" {}", b""), "doesn't start with '{'"),
    "not utf-8": (raw_file(b'{"\xff": 1}', b""), "malformed header"),
    "too deep": (raw_file(b'{"a":' * 50_000, b""), "malformed header"),
    "duplicate name": (
        raw_file(
            b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
            b"1",
        ),
        "'a' occurs twice",
    ),
    "half a surrogate pair": (
        raw_file(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        "malformed",
    ),
    "metadata not strings": (raw_file({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "entry not an object": (raw_file({"a": 1}, b""), "doesn't have exactly"),
    "missing key": (raw_file({"a": {"dtype": "U8", "shape": [1]}}, b"1"), "doesn't have exactly"),
    "unknown dtype": (raw_file({"a": entry("F33", [1], 0, 4)}, bytes(4)), "unknown dtype 'F33'"),
    "dtype a list": (raw_file({"a": {"dtype": [], "shape": [], "data_offsets": [0, 1]}}, b"1"), "unknown dtype"),
    "negative dimension": (raw_file({"a": entry("U8", [-1, -1], 0, 1)}, b"1"), "impossible shape"),
    "fractional dimension": (raw_file({"a": entry("U8", [1.0], 0, 1)}, b"1"), "impossible shape"),
    "boolean dimension": (raw_file({"a": entry("U8", [True], 0, 1)}, b"1"), "impossible shape"),
    "dimension beyond 32 bits": (raw_file({"a": entry("U8", [0, 2**40], 0, 0)}, b""), "impossible shape"),
    "too many dimensions": (raw_file({"a": entry("U8", [1] * 1000, 0, 1)}, b"1"), "impossible shape"),
    "offsets backwards": (raw_file({"a": entry("U8", [1], 1, 0)}, b"1"), "impossible data_offsets"),
    "three offsets": (raw_file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1"), "data_offsets"),
    "size not that of the shape": (raw_file({"a": entry("F32", [2], 0, 4)}, bytes(4)), "4 bytes of data, not 8"),
    "shape overflowing 64 bits": (raw_file({"a": entry("F32", [2**30] * 3, 0, 4)}, bytes(4)), "4 bytes of data, not"),
    "overlap": (raw_file({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)), "'b' overlaps"),
    "gap": (raw_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, bytes(5)), "'b' leaves a gap"),
    "gap at the front": (raw_file({"a": entry("U8", [2], 1, 3)}, bytes(3)), "'a' leaves a gap"),
    "trailing bytes": (GOOD + b"xyz", "3 bytes more than its header says"),
    "truncated": (GOOD[:-7], "7 bytes are missing; copy or download it again"),
    "all data gone": (GOOD[:-29], "29 bytes are missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_its_reason(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_safetensors(path)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_are_refused_or_read_but_never_crash(tmp_path, seed):
    """Random cuts, flipped bytes and insertions in the header of a good file."""
    rng = random.Random(seed)
    path = tmp_path / "fuzz.safetensors"
    refused = 0
    for _ in range(150):
        content = bytearray(GOOD)
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(len(content) - 29)
            action = rng.randrange(4)
            if action == 0:
                content[position] = rng.randrange(256)
            elif action == 1:
                content[position] = rng.choice(b'0123456789[]{}",:-')
            elif action == 2:
                del content[position : position + rng.randint(1, 5)]
            else:
                content[position:position] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
        path.write_bytes(content)
        try:
            mx.eval(open_safetensors(path).load())
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("length", range(0, len(GOOD), 5))
def test_every_truncation_is_refused(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(GOOD[:length])
    with pytest.raises(CheckpointError):
        open_safetensors(tmp_path / "x.safetensors")


# ---------------------------------------------------------------------------------------------------- directories


def shards(directory: Path, files: dict[str, dict[str, np.ndarray]], weight_map: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    for name, arrays in files.items():
        write_file(directory / name, arrays, metadata={"from": name})
    if weight_map is None:
        weight_map = {tensor: name for name, arrays in files.items() for tensor in arrays}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def contents(checkpoint: Checkpoint) -> dict[str, list]:
    return {name: array.tolist() for name, array in checkpoint.load().items()}


def test_shards_are_found_through_the_index(tmp_path):
    shards(tmp_path, {ONE: {"a": arange(0, 2)}, TWO: {"b": arange(5, 2)}})
    write_file(tmp_path / "consolidated.safetensors", {"a": arange(9, 2)})  # the index doesn't name it
    checkpoint = open_safetensors(tmp_path)
    assert contents(checkpoint) == {"a": [0, 1], "b": [5, 6]}
    assert checkpoint.tensors["b"].file.name == TWO
    assert checkpoint.metadata == {"from": ONE}


def test_a_single_file_wins_over_an_index(tmp_path):
    shards(tmp_path, {ONE: {"a": arange(0, 2)}, TWO: {"b": arange(5, 2)}})
    write_file(tmp_path / "model.safetensors", {"c": arange(1, 1)})
    assert contents(open_safetensors(tmp_path)) == {"c": [1]}


def test_an_index_of_another_name_is_found(tmp_path):
    shards(tmp_path, {ONE: {"a": arange(0, 2)}, TWO: {"b": arange(5, 2)}})
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "other.safetensors.index.json")
    assert contents(open_safetensors(tmp_path)) == {"a": [0, 1], "b": [5, 6]}


def test_without_index_all_files_count(tmp_path):
    write_file(tmp_path / "weights.00.safetensors", {"a": arange(0, 2)})
    write_file(tmp_path / "weights.01.safetensors", {"b": arange(5, 2)})
    assert contents(open_safetensors(tmp_path)) == {"a": [0, 1], "b": [5, 6]}


def test_a_tensor_in_two_files_is_an_error(tmp_path):
    write_file(tmp_path / "0000100_adapters.safetensors", {"a": arange(0, 2)})
    write_file(tmp_path / "adapters.safetensors", {"a": arange(5, 2)})
    with pytest.raises(CheckpointError, match=r"'a' is both in 0000100_adapters\.safetensors and in adapters"):
        open_safetensors(tmp_path)


def test_numbered_shards_without_index_must_be_complete(tmp_path):
    write_file(tmp_path / "model-00002-of-00003.safetensors", {"a": arange(0, 2)})
    with pytest.raises(CheckpointError, match=r"lacks 2 shards: model-00001-of-00003.*, model-00003-of-00003"):
        open_safetensors(tmp_path)


def test_all_differences_between_index_and_shards_are_listed(tmp_path):
    files = {ONE: {"a": arange(0, 2), "extra1": arange(0, 1), "extra2": arange(0, 1)}, TWO: {"b": arange(5, 2)}}
    shards(tmp_path, files, {"a": ONE, "b": ONE, "gone1": TWO, "gone2": TWO})
    expected = (
        r"2 listed but in no shard: gone1, gone2; 2 in a shard but not listed: extra1, extra2; "
        r"1 in another shard than listed: b"
    )
    with pytest.raises(CheckpointError, match=expected):
        open_safetensors(tmp_path)


def test_all_absent_shards_are_listed(tmp_path):
    shards(tmp_path, {ONE: {"a": arange(0, 2)}}, {"a": ONE, "b": TWO, "c": "x.safetensors"})
    with pytest.raises(CheckpointError, match=rf"lacks 2 of 3 shards: {TWO}, x\.safetensors"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}'],
)
def test_a_bad_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json|lacks 1 of 1"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "sub/../../outside.safetensors", "x\0y"])
def test_an_index_cannot_name_a_file_outside(tmp_path, name):
    model, outside = tmp_path / "model", tmp_path / "outside.safetensors"
    write_file(outside, {"a": arange(0, 2)})
    shards(model, {}, {"a": str(outside) if name == "ABSOLUTE" else name})
    with pytest.raises(CheckpointError, match=r"lies outside|can't be found|lacks"):
        open_safetensors(model)


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_a_link_that_leaves_the_directory_is_refused(tmp_path, name):
    write_file(tmp_path / "outside.safetensors", {"a": arange(0, 2)})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).symlink_to("../outside.safetensors")
    with pytest.raises(CheckpointError, match="lies outside the directory"):
        open_safetensors(tmp_path / "model")
    assert contents(open_safetensors(tmp_path / "model" / name)) == {"a": [0, 1]}  # named by the user: fine


def test_a_linked_directory_and_links_within_it_are_fine(tmp_path):
    write_file_in = tmp_path / "real"
    write_file_in.mkdir()
    write_file(write_file_in / "weights.bin", {"a": arange(0, 2)})
    (write_file_in / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "alias").symlink_to("real")
    assert contents(open_safetensors(tmp_path / "alias")) == {"a": [0, 1]}


@pytest.mark.parametrize("layout", ["blobs of the repository", "blobs of the whole cache"])
def test_the_links_of_the_hub_cache_are_followed(tmp_path, layout):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    for folder in (snapshot, repository / "blobs", tmp_path / "hub" / "blobs" / "12"):
        folder.mkdir(parents=True)
    if layout == "blobs of the repository":
        write_file(repository / "blobs" / "1234", {"a": arange(0, 2)})
    else:
        write_file(tmp_path / "hub" / "blobs" / "12" / "1234", {"a": arange(0, 2)})
        (repository / "blobs" / "1234").symlink_to("../../blobs/12/1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    assert contents(open_safetensors(snapshot)) == {"a": [0, 1]}
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../../elsewhere")
    with pytest.raises(CheckpointError, match=r"lies outside|can't be"):
        open_safetensors(snapshot)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"holds no \*\.safetensors"):
        open_safetensors(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no such file"):
        open_safetensors(tmp_path / "absent")


def test_an_interrupted_replacement_of_shards_is_not_taken_for_a_model(tmp_path):
    shards(tmp_path, {ONE: {"a": arange(0, 2)}, TWO: {"b": arange(5, 2)}})
    index = tmp_path / "model.safetensors.index.json"
    index.rename(tmp_path / ".model.safetensors.index.json.0a1b2c3d.tmp")
    with pytest.raises(MlxlmError, match="a save was interrupted"):
        open_safetensors(tmp_path)
