"""Reading GGUF: a file of the `gguf` package with its own dequantized values, and files put together by hand."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.checkpoint import Quantization, dequantize, open_gguf
from mlxlm.checkpoint.gguf_tensors import TYPES, values_of_blocks
from mlxlm.errors import CheckpointError, ModelNotFoundError

GOLDEN = Path(__file__).with_name("golden.gguf")
QUANTIZED = [f"{kind}.{name}" for kind in ("Q4_0", "Q4_1", "Q8_0") for name in ("flat", "matrix", "experts")]


# ---------------------------------------------------------------------------------------------------- by hand


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(of: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", of, count) + items


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = shape[::-1]
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def made(
    keys: list[bytes] = (),
    tensors: list[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % alignment) + data


F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8
# Of each type with blocks: the values in one, and its number.
BLOCK_TYPES = {name: (values, number) for number, (name, values, _) in TYPES.items() if values > 1}
UINT32, STRING, ARRAY = 4, 8, 9
FLOATS = struct.pack("<8f", *range(8))


@pytest.fixture
def write(tmp_path):
    def write(content: bytes) -> Path:
        path = tmp_path / "made.gguf"
        path.write_bytes(content)
        return path

    return write


def values_by_block(kind: str, data: bytes) -> np.ndarray:
    """What blocks stand for, one value at a time, straight from the format's description."""
    values = []
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    for start in range(0, len(data), size):
        block = data[start : start + size]
        (d,) = struct.unpack_from("<e", block)
        if kind == "Q8_0":
            values += [d * q for q in struct.unpack_from("<32b", block, 2)]
        else:
            nibbles = block[size - 16 :]
            q = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
            m = struct.unpack_from("<e", block, 2)[0] if kind == "Q4_1" else -8 * d
            values += [d * x + m for x in q]
    return np.array(values, np.float32)


def random_blocks(kind: str, count: int, seed: int) -> bytes:
    """Blocks of every integer value, with finite scales."""
    rng = np.random.default_rng(seed)
    scales = rng.normal(size=(count, 2 if kind == "Q4_1" else 1)).astype(np.float16)
    integers = rng.integers(0, 256, (count, 32 if kind == "Q8_0" else 16), dtype=np.uint8)
    return np.concatenate([scales.view(np.uint8), integers], axis=1).tobytes()


def weights(arrays: dict[str, mx.array], prefix: str) -> tuple[mx.array, mx.array, mx.array]:
    return arrays[f"{prefix}.weight"], arrays[f"{prefix}.scales"], arrays[f"{prefix}.biases"]


# ---------------------------------------------------------------------------------------------------- what is read


def test_metadata_of_every_type_becomes_plain_python():
    metadata = open_gguf(GOLDEN).metadata
    expected = {
        "general.architecture": "golden",
        "test.uint8": 200,
        "test.int8": -100,
        "test.uint16": 60000,
        "test.int16": -30000,
        "test.uint32": 4_000_000_000,
        "test.int32": -2_000_000_000,
        "test.uint64": 2**63 + 5,
        "test.int64": -(2**62),
        "test.float32": 0.5,
        "test.float64": 0.1,
        "test.bool": True,
        "test.string": "żółw 🐢",
        "test.strings": ["a", "", "Ġthe", "日本"],
    }
    arrays = {name: value for name, value in metadata.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in metadata.items() if name not in arrays}
    assert plain == expected
    assert {name: type(value) for name, value in plain.items()} == {name: type(v) for name, v in expected.items()}
    assert {name: (value.dtype, value.tolist()) for name, value in arrays.items()} == {
        "test.ints": (np.int32, [-1, 2, 3]),
        "test.floats": (np.float32, [0.25, -1.5]),
        "test.bools": (np.bool_, [True, False, True]),
    }


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_tensors_have_the_values_of_the_gguf_package(name):
    checkpoint = open_gguf(GOLDEN)
    info = checkpoint.tensors[f"{name}.weight"]
    expected = checkpoint.load([f"{name}.expected"])[f"{name}.expected"]
    assert info.shape == expected.shape
    assert info.dtype == name.split(".")[0]
    assert info.quantization == Quantization(8 if info.dtype == "Q8_0" else 4, 32)
    values = dequantize(*weights(checkpoint.load([info.name]), name), info.quantization, mx.float32)
    assert values.dtype == mx.float32
    assert np.array_equal(np.array(values), np.array(expected))


def test_the_packed_arrays_are_those_of_mlxs_own_reader(write):
    """MLX reads plain files; on golden.gguf (a float64 among the metadata) it ends the process."""
    kinds, data, tensors = {"Q4_0": Q4_0, "Q4_1": Q4_1, "Q8_0": Q8_0}, b"", []
    for kind, number in kinds.items():
        tensors.append(tensor(f"{kind}.weight", (7, 64), number, len(data)))
        blocks = random_blocks(kind, 14, seed=5)
        data += blocks + bytes(-len(blocks) % 32)
    tensors.append(tensor("norm", (8,), F32, len(data)))
    path = write(made([key("general.architecture", STRING, text("x"))], tensors, data + FLOATS))
    ours, theirs = open_gguf(path).load(), mx.load(str(path))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert np.array_equal(np.array(array.view(mx.uint8)), np.array(theirs[name].view(mx.uint8))), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("rows", [1, 300], ids=["one block", "more blocks than are repacked at once"])
def test_every_block_is_repacked(write, kind, rows):
    number = {entry[0]: n for n, entry in TYPES.items()}[kind]
    data = random_blocks(kind, 31 * rows, seed=rows)
    path = write(made([], [tensor("w.weight", (rows, 31 * 32), number, 0)], data))
    arrays = open_gguf(path).load()
    bits = 8 if kind == "Q8_0" else 4
    assert arrays["w.weight"].shape == (rows, 31 * bits)
    assert arrays["w.scales"].shape == arrays["w.biases"].shape == (rows, 31)
    assert arrays["w.scales"].dtype == arrays["w.biases"].dtype == mx.float16
    values = dequantize(*weights(arrays, "w"), Quantization(bits, 32), mx.float32)
    expected = values_by_block(kind, data).reshape(rows, 31 * 32)
    assert np.array_equal(np.array(values), expected)
    slowly = mx.dequantize(
        *(a if a.dtype == mx.uint32 else a.astype(mx.float32) for a in weights(arrays, "w")), 32, bits
    )
    assert np.allclose(np.array(slowly), expected, rtol=1e-5, atol=1e-6)


def test_plain_tensors_keep_their_type_and_value():
    checkpoint = open_gguf(GOLDEN)
    arrays = checkpoint.load([name for name in checkpoint.tensors if name.startswith("plain.")])
    dtypes = {name: str(array.dtype).removeprefix("mlx.core.") for name, array in arrays.items()}
    assert dtypes == {name: checkpoint.tensors[name].dtype for name in arrays}
    assert arrays["plain.bf16"].dtype == mx.bfloat16
    assert mx.array_equal(arrays["plain.bf16"].astype(mx.float32), arrays["plain.bf16.expected"])
    assert mx.array_equal(arrays["plain.f32"].astype(mx.float16), arrays["plain.f16"])
    for name in ("int8", "int16", "int32", "int64"):
        assert arrays[f"plain.{name}"].tolist() == [[-4, -3, -2, -1], [0, 1, 2, 3]]


def test_shapes_are_row_major(write):
    data = np.arange(24, dtype=np.float32)
    path = write(made([], [tensor("x", (2, 3, 4), F32, 0)], data.tobytes()))
    info = open_gguf(path).tensors["x"]
    assert (info.shape, info.dtype, info.nbytes, info.file) == ((2, 3, 4), "float32", 96, path)
    assert np.array_equal(np.array(open_gguf(path).load()["x"]), data.reshape(2, 3, 4))


def test_scalars_empty_tensors_version_2_and_alignment(write):
    keys = [key("general.alignment", UINT32, struct.pack("<I", 64))]
    tensors = [tensor("s", (), F32, 0), tensor("e", (0, 32), Q4_0, 64), tensor("f", (3,), F16, 64)]
    data = struct.pack("<f", 2.5) + bytes(60) + struct.pack("<3e", 1, 2, 3)
    arrays = open_gguf(write(made(keys, tensors, data, version=2, alignment=64))).load()
    assert arrays["s"].shape == ()
    assert arrays["s"].item() == 2.5
    assert arrays["e.weight"].shape == (0, 4)
    assert arrays["e.scales"].shape == (0, 1)
    assert arrays["f"].tolist() == [1, 2, 3]


def test_nested_arrays_become_lists(write):
    inner = array(STRING, 2, text("a") + text("b")) + array(STRING, 0, b"") + array(UINT32, 1, struct.pack("<I", 7))
    path = write(made([key("nested", ARRAY, array(ARRAY, 3, inner))]))
    first, second, third = open_gguf(path).metadata["nested"]
    assert (first, second, third.tolist()) == (["a", "b"], [], [7])


def test_a_file_without_tensors_gives_its_metadata(write):
    checkpoint = open_gguf(write(made([key("tokenizer.ggml.model", STRING, text("gpt2"))])))
    assert checkpoint.metadata == {"tokenizer.ggml.model": "gpt2"}
    assert checkpoint.load() == {}


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", sorted(kind for kind in BLOCK_TYPES if kind not in ("Q4_0", "Q4_1", "Q8_0")))
def test_every_block_type_has_the_values_of_the_gguf_package(write, kind):
    import gguf

    values, number = BLOCK_TYPES[kind]
    blocks = np.random.default_rng(number).integers(0, 256, (2, 3, TYPES[number][2]), dtype=np.uint8)
    path = write(made([], [tensor("w.weight", (2, 3 * values), number, 0)], blocks.tobytes()))
    checkpoint = open_gguf(path)
    found = np.array(checkpoint.load()["w.weight"])
    assert (checkpoint.tensors["w.weight"].dtype, found.dtype, found.shape) == (kind, np.float32, (2, 3 * values))
    with np.errstate(all="ignore"):
        if kind in ("Q8_1", "Q8_K", "Q1_0"):  # not in the package
            np.testing.assert_array_equal(found, values_by_hand(kind, blocks.reshape(6, -1)).reshape(found.shape))
            return
        expected = gguf.dequantize(blocks.reshape(2, -1), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found.view(np.uint32), expected.astype(np.float32).view(np.uint32))


def values_by_hand(kind: str, blocks: np.ndarray) -> np.ndarray:
    rows = []
    for block in map(bytes, blocks):
        if kind == "Q8_K":
            scale, integers = np.float32(struct.unpack_from("<f", block)[0]), struct.unpack_from("<256b", block, 4)
        elif kind == "Q8_1":
            scale, integers = np.float32(struct.unpack_from("<e", block)[0]), struct.unpack_from("<32b", block, 4)
        else:
            scale = np.float32(struct.unpack_from("<e", block)[0])
            integers = [1 if block[2 + i // 8] >> i % 8 & 1 else -1 for i in range(128)]
        rows.append([scale * np.float32(q) for q in integers])
    return np.array(rows, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_many_random_blocks_have_the_values_of_the_gguf_package(kind):
    import gguf

    if kind in ("Q8_1", "Q8_K", "Q1_0"):
        pytest.skip("not in the gguf package")
    number = BLOCK_TYPES[kind][1]
    blocks = np.random.default_rng(number).integers(0, 256, (20000, TYPES[number][2]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    assert np.array_equal(values_of_blocks(kind, blocks).view(np.uint32), expected.view(np.uint32))


def test_float64_comes_as_float32(write):
    path = write(made([], [tensor("x", (2,), 28, 0)], struct.pack("<2d", 0.1, -3)))
    assert open_gguf(path).load()["x"].tolist() == [float(np.float32(0.1)), -3]


ONE_STRING = [key("k", STRING, text("v"))]
GOOD = made(ONE_STRING, [tensor("x", (8,), F32, 0)], FLOATS)
HUGE = struct.pack("<Q", 2**63)

BAD = {
    "empty": (b"", "not a GGUF file"),
    "another format": (b"ggjt" + bytes(100), "starts with b'ggjt'"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "only the magic": (b"GGUF\3\0\0\0", "truncated after 8 bytes"),
    "big endian": (b"GGUF\0\0\0\3" + bytes(16), "big endian"),
    "version 1": (made(version=1), "version 1"),
    "version 77": (made(version=77), "version 77"),
    "too many keys": (made(counts=(0, 2**62)), r"no room for \d+ keys"),
    "too many tensors": (made(counts=(2**62, 0)), r"no room for \d+ tensors"),
    "long key": (made([HUGE + bytes(32)]), "bytes more than there are"),
    "long string": (
        made([text("k") + struct.pack("<I", STRING) + HUGE + bytes(32)]),
        "bytes more than there are",
    ),
    "long array": (made([key("k", ARRAY, array(UINT32, 2**62, bytes(64)))]), "bytes more than there are"),
    "many strings": (made([key("k", ARRAY, array(STRING, 2**62, bytes(64)))]), "no room for"),
    "long string in an array": (
        made([key("k", ARRAY, array(STRING, 3, text("a") + HUGE + text("c")))]),
        "string 1 of 3",
    ),
    "strings beyond the end": (
        made([key("k", ARRAY, array(STRING, 4, text("abcdefgh") * 4))], alignment=1)[:-9],
        "string 3 of 4",
    ),
    "nested too deep": (made([key("k", ARRAY, array(ARRAY, 1, b"") * 50)]), "nests arrays deeper"),
    "many nested arrays": (made([key("k", ARRAY, array(ARRAY, 2**60, bytes(64)))]), "no room for"),
    "unknown value type": (made([key("k", 13, bytes(16))]), "unknown value type 13"),
    "unknown item type": (made([key("k", ARRAY, array(99, 1, bytes(16)))]), "unknown value type 99|no room"),
    "key not utf-8": (made([key("k", STRING, text("v")).replace(b"k", b"\xff")]), "not valid UTF-8"),
    "value not utf-8": (made([key("k", STRING, text(b"\xff\xfe"))]), "value of 'k' is not valid UTF-8"),
    "item not utf-8": (made([key("k", ARRAY, array(STRING, 2, text("a") + text(b"\xc3")))]), "item 1 of 'k'"),
    "key twice": (made(ONE_STRING * 2), "key 'k' occurs twice"),
    "tensor twice": (made([], [tensor("x", (8,), F32, 0)] * 2, FLOATS), "'x' occurs twice"),
    "five dimensions": (made([], [tensor("x", (1,) * 5, F32, 0)], FLOATS), "5 dimensions"),
    "huge dimension": (made([], [tensor("x", (0, 2**40), F32, 0)], FLOATS), "impossible shape"),
    "unknown tensor type": (made([], [tensor("x", (8,), 4, 0)], FLOATS), "unknown type 4"),
    "rows not of whole blocks": (made([], [tensor("x", (4, 8), Q8_0, 0)], FLOATS), "multiple of Q8_0's 32"),
    "unaligned": (made([], [tensor("x", (1,), F32, 4)], FLOATS), "not at a multiple of 32"),
    "overlap": (
        made([], [tensor("x", (16,), F32, 0), tensor("y", (1,), F32, 32)], FLOATS * 2),
        "'x' and 'y' overlap",
    ),
    "alignment 0": (
        made([key("general.alignment", UINT32, bytes(4))], [tensor("x", (8,), F32, 0)], FLOATS),
        "alignment",
    ),
    "alignment a string": (made([key("general.alignment", STRING, text("32"))]), "general.alignment is '32'"),
    "truncated data": (GOOD[:-5], "truncated: 5 bytes are missing"),
    "data gone": (GOOD[: -len(FLOATS)], "truncated: 32 bytes are missing"),
    "far offset": (made([], [tensor("x", (8,), F32, 2**60)], FLOATS), "bytes are missing"),
    "one part of several": (
        made([key("split.count", 2, struct.pack("<H", 3))], [tensor("x", (8,), F32, 0)], FLOATS),
        "one of 3 parts.*--merge",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_its_reason(write, case):
    content, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_gguf(write(content))
    assert "made.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_that_overflow_a_float16_bias_are_refused(write):
    block = struct.pack("<e", 60000.0) + bytes(32)
    with pytest.raises(CheckpointError, match=r"'x\.weight' has scales too large"):
        open_gguf(write(made([], [tensor("x.weight", (32,), Q8_0, 0)], block))).load()


def test_names_that_clash_with_the_parts_of_a_quantized_weight_are_refused(write):
    tensors = [tensor("x.weight", (32,), Q8_0, 0), tensor("x.scales", (8,), F32, 64)]
    with pytest.raises(CheckpointError, match=r"'x\.scales' clash|clash with 'x\.scales'"):
        open_gguf(write(made([], tensors, bytes(64) + FLOATS))).load()


def test_a_file_that_shrinks_after_opening_is_refused(write):
    path = write(GOOD)
    checkpoint = open_gguf(path)
    path.write_bytes(GOOD[:-4])
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.load()


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no such file: .*absent\.gguf"):
        open_gguf(tmp_path / "absent.gguf")


@pytest.mark.parametrize("step", [0, 1, 2])
def test_every_truncation_is_refused(write, step):
    content = GOLDEN.read_bytes()[:3000] if step else GOOD
    for length in range(step, len(content), 37 if step else 1):
        with pytest.raises(CheckpointError):
            open_gguf(write(content[:length]))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_are_refused_or_read_but_never_crash(write, seed):
    rng = random.Random(seed)
    golden = GOLDEN.read_bytes()
    header = golden.index(b"plain.int64") + 60
    refused = 0
    for _ in range(150):
        content = bytearray(golden)
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(4, header)
            if rng.random() < 0.7:
                content[position] = rng.choice([0, 1, 0xFF, rng.randrange(256)])
            else:
                content[position : position + 8] = struct.pack("<Q", rng.choice([2**64 - 1, 2**63, 2**31, 2**20]))
        try:
            mx.eval(open_gguf(write(bytes(content))).load())
        except CheckpointError:
            refused += 1
    assert refused > 50
