"""Damaged and hostile weight files: each a clear error or a file that reads, never a crash, and in bounded time."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_pickles import group, named, number, state, storage, tensor, word

from mlxlm.checkpoint import open_checkpoint
from mlxlm.checkpoint.gguf_writer import gguf_layout
from mlxlm.checkpoint.pickles import Refused, read_pickle
from mlxlm.checkpoint.safetensors_writer import safetensors_layout
from mlxlm.errors import MlxlmError

FIXTURES = Path(__file__).parent.parent / "fixtures"
SHAPES = [("a.weight", (4, 8)), ("b", (3,)), ("c", ())]
# What a file may make of the reader: far above what these small files hold, far below what a bomb would.
MOST_BYTES = 10_000_000

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
# The default run is the same every time; the thorough one looks elsewhere each time.
quick = settings(max_examples=40, derandomize=True, deadline=10_000, suppress_health_check=CHECKS)
thorough = settings(max_examples=3000, deadline=10_000, suppress_health_check=CHECKS)


def whole_files() -> dict[str, bytes]:
    """One small file of each kind."""
    layout = safetensors_layout([(name, mx.float32, shape) for name, shape in SHAPES])
    metadata = {"general.architecture": "x", "tokenizer.ggml.tokens": ["a", "b"], "n": np.arange(3, dtype=np.int32)}
    blocks = [("q.weight", "Q4_K", (2, 256)), ("r.weight", "Q8_0", (2, 32)), ("s", "F16", (5,))]
    gguf = gguf_layout(metadata, blocks)
    return {
        "x.safetensors": layout.header + bytes(layout.size - len(layout.header)),
        "x.gguf": gguf.header + bytes(gguf.size - len(gguf.header)),
        "legacy.bin": (FIXTURES / "torch" / "legacy.bin").read_bytes(),
        "archive.bin": (FIXTURES / "torch" / "archive.bin").read_bytes(),
    }


FILES = whole_files()


def read(path: Path) -> None:
    """Open a file and load all of it; only errors of this package may come out, each one line."""
    problem, arrays = "a text", {}
    try:
        arrays = open_checkpoint(path).load()
        mx.eval(arrays)
    except MlxlmError as error:
        problem = str(error)
    assert problem
    assert "\n" not in problem
    assert sum(array.nbytes for array in arrays.values()) < MOST_BYTES


def interpret(program: bytes) -> None:
    """Run opcodes; only a refusal may come out."""
    problem = "a text"
    try:
        read_pickle(io.BytesIO(program))
    except Refused as error:
        problem = str(error)
    assert problem


@st.composite
def damaged(draw, name: str) -> bytes:
    """A file with bytes changed, cut out, repeated or cut off, mostly near the header."""
    content = bytearray(FILES[name])
    for _ in range(draw(st.integers(1, 4))):
        place = min(draw(st.integers(0, len(content))), draw(st.integers(0, len(content))))
        kind = draw(st.sampled_from(["change", "number", "insert", "remove", "cut"]))
        if kind == "change":
            new = draw(st.binary(min_size=1, max_size=4))
            content[place : place + len(new)] = new
        elif kind == "number":
            value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
            content[place : place + 8] = struct.pack("<Q", value)
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=9))
        elif kind == "remove":
            del content[place : place + draw(st.integers(1, 9))]
        else:
            del content[place:]
    return bytes(content)


def fuzz(name: str, tmp_path: Path, profile: settings) -> None:
    @profile
    @given(damaged(name))
    def check(content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        read(path)

    check()


@pytest.mark.parametrize("name", sorted(FILES))
def test_damaged_files_are_errors_or_read(name, tmp_path):
    read_whole = tmp_path / "whole"
    read_whole.mkdir()
    (read_whole / name).write_bytes(FILES[name])
    assert open_checkpoint(read_whole / name).load()
    fuzz(name, tmp_path, quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FILES))
def test_many_damaged_files_are_errors_or_read(name, tmp_path):
    fuzz(name, tmp_path, thorough)


PIECES = [
    b"\x80\x02", b"}", b"]", b")", b"(", b"u", b"s", b"e", b"a", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"Q",
    b"N",
    b"\x88", b"\x89", b"0", b"2", b"q\x00", b"h\x00", b"K\x07", b".", b"\x93", b"\x94", b"o", b"\x81", b"\x92", b"1",
    word("storage"), word("0"), number(6), number(-1), number(2**62), storage(), tensor(), group(), state(a=tensor()),
    named("torch.FloatStorage"), named("torch._utils._rebuild_tensor_v2"), named("collections.OrderedDict"),
    named("torch._utils._rebuild_parameter"), named("torch._tensor._rebuild_from_type_v2"), named("torch.Size"),
    named("os.system"), named("builtins.eval"), named("torch.Tensor"), named("torch.float32"),
]  # fmt: skip
programs = st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=40).map(b"".join)


@settings(max_examples=200, derandomize=True, deadline=10_000, suppress_health_check=CHECKS)
@given(programs)
def test_programs_of_pickle_opcodes_are_refused_or_describe_something(program):
    interpret(program)


@pytest.mark.slow
@settings(max_examples=5_000, deadline=10_000, suppress_health_check=CHECKS)
@given(programs)
def test_many_programs_of_pickle_opcodes_are_refused_or_describe_something(program):
    interpret(program)


texts = st.text("ab./\\é\0", max_size=6)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "../x", "/etc"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@quick
@given(st.dictionaries(st.sampled_from(["weight_map", "metadata", "x"]), json_values, max_size=3))
def test_an_index_may_say_anything(tmp_path, content):
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        folder = tmp_path / index.split(".")[0]
        folder.mkdir(exist_ok=True)
        (folder / index).write_text(json.dumps(content))
        read(folder)
