"""The plan's threadgroup memory is what the kernels declare: array by array, for every configuration."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from functools import cache
from itertools import product

import pytest

from mlxlm.kernels.attention.device import metal_profile
from mlxlm.kernels.attention.metal import source
from mlxlm.kernels.attention.plan import THREADGROUP_BYTES, TilePlan, plan
from mlxlm.kernels.attention.problem import AttentionProblem
from mlxlm.kernels.attention.tile import threadgroup_arrays

BASE = AttentionProblem(
    dtype="float32", batch=2, heads=8, kv_heads=2, query_length=512, key_length=512, head_dim=64, value_dim=64
)
KERNELS = (
    "forward", "delta", "query_gradient", "key_value_gradient", "bias_gradient", "relative_bias_gradient", "decode",
    "decode_combine",
)  # fmt: skip
_SIZES = {"float": 4, "int": 4, "uint": 4, "float2": 8, "int2": 8}
_FLAGS = ("masked", "segments", "relative_bias", "alibi", "dropout", "bias")


def test_every_text_is_a_kernel_or_a_part_of_one():
    bodies = "".join(source._read(f"{name}.metal") for name in KERNELS)
    for path in source._FOLDER.glob("*.metal"):
        assert path.stem in (*KERNELS, "header") or f'#include "{path.name}"' in bodies, path.name
    assert not re.search(r"threadgroup \w+ \w+\[", source._read("header.metal"))


def configuration(problem: AttentionProblem) -> source.Features:
    given = {f.name: getattr(problem, f.name) for f in fields(source.Features) if hasattr(problem, f.name)}
    rest = {f.name: False for f in fields(source.Features) if f.name not in given}
    rest |= {"scale": 0.5, "bounds": problem.masked}
    given |= {"softcap": 0.0, "dropout": 0.1 * problem.dropout, "bias": problem.dtype if problem.bias else ""}
    return source.Features(**rest, **given)


def shapes(kernel: str, planned: TilePlan) -> list[tuple[source.Shape, bool]]:
    """The constants of each run of a kernel, as launch.py gives them, and whether it computes dK."""
    tile = planned.tile(kernel)
    if tile is None:
        return [(source.Shape(block_queries=1, block_keys=1, simdgroups=8), True)]
    if kernel == "key_value_gradient" and tile.passes == 2:
        runs = [{"compute_dv": False}, {"compute_dk": False}]
    elif kernel == "bias_gradient":
        names = ("reduce_batch", "reduce_heads", "reduce_queries", "reduce_keys")
        runs = [dict(zip(names, planned.problem.bias_broadcast, strict=True))]
    elif kernel == "decode":
        runs = [{"query_rows": tile.block_queries}]
    else:
        runs = [{}]
    return [(source.Shape.of(tile, **run), run.get("compute_dk", True)) for run in runs]


# ------------------------------------------------------------------- reading the arrays off the text of a kernel


@cache
def constants_of_header() -> list[tuple[str, str]]:
    """Name and expression of each integer that header.metal derives from the configuration."""
    return re.findall(r"^constant constexpr int (\w+) = (.*);", source._read("header.metal"), re.MULTILINE)


@cache
def compiled(expression: str):
    """An integer expression of C++, compiled as Python."""
    text = re.sub(r"(\w+) > (\w+) \? (\w+) : (\w+)", r"(\3 if \1 > \2 else \4)", expression)
    return compile(text.replace("sizeof(element_t)", "ELEMENT_BYTES").replace("/", "//"), expression, "eval")


@cache
def condition(expression: str):
    return compile(expression.replace("!", "not "), expression, "eval")


def declared(kernel: str, features: source.Features, shape: source.Shape, element_bytes: int) -> dict[str, int]:
    """Bytes of each threadgroup array that the text of a configuration declares."""
    names: dict[str, int] = {"ELEMENT_BYTES": element_bytes}
    lines = source.header(features, shape, decode=kernel.startswith("decode")).partition("// Shared by all")[0]
    for name, value in re.findall(r"^(?:#define|constant constexpr int) (\w+) (?:= )?(\d+)", lines, re.MULTILINE):
        names[name] = int(value)
    for name, expression in constants_of_header():
        names[name] = eval(compiled(expression), {}, names)
    found, live = {}, [True]
    for line in source.body(kernel).splitlines():
        line = line.strip()
        if line.startswith("#if"):
            live.append(live[-1] and bool(eval(condition(line[3:].strip()), {}, names)))
        elif line == "#else":
            live[-1] = live[-2] and not live[-1]
        elif line == "#endif":
            live.pop()
        elif live[-1] and (constant := re.match(r"constexpr int (\w+) = (.*);", line)):
            names[constant[1]] = eval(compiled(constant[2]), {}, names)
        elif live[-1] and (array := re.match(r"threadgroup (\w+) (\w+)\[(.*)\];", line)):
            size = element_bytes if array[1] == "element_t" else _SIZES[array[1]]
            assert array[2] not in found
            found[array[2]] = size * eval(compiled(array[3]), {}, names)
    assert live == [True]
    return found


def check(problem: AttentionProblem, generation: int) -> None:
    planned = plan(problem, metal_profile(f"applegpu_g{12 + generation}g"))
    features = configuration(problem)
    for kernel in KERNELS:
        if kernel == "decode" and planned.decode is None:
            continue
        if (kernel == "bias_gradient" and not problem.bias) or (kernel.startswith("rel") and not problem.relative_bias):
            continue
        largest = 0
        for shape, compute_dk in shapes(kernel, planned):
            arrays = declared(kernel, features, shape, problem.element_bytes)
            tile = planned.tile(kernel)
            expected = {} if tile is None else threadgroup_arrays(kernel, tile, problem, compute_dk=compute_dk)
            assert arrays == expected, (kernel, problem)
            largest = max(largest, sum(arrays.values()))
        assert planned.threadgroup_bytes(kernel) == largest <= THREADGROUP_BYTES, (kernel, problem)


# The tiles of other generations are those of these: a test of the plan says so.
@pytest.mark.parametrize("generation", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_width_declares_what_the_plan_says_with_everything_asked_for(dtype, generation):
    everything = dict.fromkeys(_FLAGS, True) | {"bias_broadcast": (False, False, True, False)}
    widths = {(d, e) for d in range(8, 257, 8) for e in (d, 8, 256)} | {(20, 33), (1, 1), (255, 130)}
    for width, value_width in sorted(widths):
        problem = replace(BASE, dtype=dtype, head_dim=width, value_dim=value_width, **everything)
        check(problem, generation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_set_of_features_declares_what_the_plan_says(dtype):
    for chosen in product((False, True), repeat=len(_FLAGS)):
        given = dict(zip(_FLAGS, chosen, strict=True))
        for width in (64, 136):
            check(replace(BASE, dtype=dtype, head_dim=width, value_dim=width, **given), 1)


@pytest.mark.parametrize("broadcast", list(product((False, True), repeat=4)), ids=str)
def test_every_shape_of_bias_declares_what_the_plan_says(broadcast):
    check(replace(BASE, bias=True, bias_broadcast=broadcast), 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("queries", range(1, 9))
def test_decoding_declares_what_the_plan_says(queries, dtype):
    for heads, kv_heads, width in product((8,), (1, 2, 8), (8, 64, 80, 128, 256)):
        problem = replace(BASE, dtype=dtype, heads=heads, kv_heads=kv_heads, query_length=queries)
        check(replace(problem, head_dim=width, value_dim=width, masked=True, segments=True), 1)
