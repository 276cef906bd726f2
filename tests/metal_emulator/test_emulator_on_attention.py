"""The emulator on the attention kernels with a defect put in: each must be stopped, or give something else."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest

from mlxlm.kernels.attention import metal
from tools.metal_emulator import EmulationError, attention_cases, compiler, run_kernel
from tools.metal_emulator.session import Dispatch
from tools.metal_emulator.source import parse

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
_FULL = {"mask": "segments", "relative_bias": True, "bias": "LS", "alibi": True, "batch": 2, "heads": 2, "kv_heads": 1}
# Three ways to lay out threadgroup memory: rows in registers, rows in threadgroup memory, tiles that take turns.
CASES = {
    "registers": attention_cases.Case(**_FULL, queries=70, keys=75),
    "threadgroup": attention_cases.Case(**_FULL, queries=70, keys=75, head_dim=100, value_dim=100),
    "turns": attention_cases.Case(**_FULL, queries=35, keys=37, head_dim=130, value_dim=130),
    "decode": attention_cases.Case(queries=3, keys=75, mask="segments"),
}


# Barriers that a configuration could do without, because they stand in a part that other kernels share or that the
# loop over the next tile needs: the one before a tile is staged, where another barrier has just been passed.
SPARE = {
    "registers": {("relative_bias_gradient", 0)},
    "threadgroup": {("relative_bias_gradient", 0), ("bias_gradient", 1)},
    "turns": {("relative_bias_gradient", 0), ("bias_gradient", 1)},
    "decode": set(),
}


@pytest.fixture(scope="module")
def dispatches() -> dict[str, list[Dispatch]]:
    """By case: what ran, with its buffers."""
    found = {}
    for name, case in CASES.items():
        with attention_cases.emulated_attention(keeping=True) as device:
            attention_cases.results(metal.attention, attention_cases.make(case))
        found[name] = device.dispatches
    return found


def short_name(dispatch: Dispatch) -> str:
    return dispatch.name.removeprefix("mlxlm_attention_")


def preprocessed(text: str) -> str:
    """The text with its #if parts decided, so that what remains is what this configuration runs."""
    text = re.sub(r"^\s*#include <.*$", "", text, flags=re.MULTILINE)
    command = [str(compiler.compiler()), "-E", "-P", "-w", "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def outcome(dispatch: Dispatch, text: str) -> str:
    """What happens when a dispatch is run again with another text: the emulator's words, "different" or "same"."""
    kernel = parse(text)
    outputs = [argument.name for argument in kernel.arguments if argument.writable]
    buffers = {name: buffer.copy() for name, buffer in dispatch.buffers.items()}
    try:
        run_kernel(kernel, buffers, dispatch.grid, dispatch.threadgroup)
    except EmulationError as error:
        return str(error)
    same = all(np.array_equal(buffers[name], dispatch.buffers[name]) for name in outputs)
    return "same" if same else "different"


def without(text: str, what: str, number: int, instead: str = "") -> str:
    """The text with one occurrence of something replaced."""
    parts = text.split(what)
    return what.join(parts[: number + 1]) + instead + what.join(parts[number + 1 :])


def test_a_dispatch_run_again_gives_the_same(dispatches):
    for name, found in dispatches.items():
        for dispatch in found:
            assert outcome(dispatch, dispatch.kernel.text) == "same", (name, dispatch.name)


@pytest.mark.parametrize("name", CASES)
def test_a_removed_barrier_is_seen(name, dispatches):
    mutants = []
    for dispatch in dispatches[name]:
        text = preprocessed(dispatch.kernel.text)
        for number in range(text.count(BARRIER)):
            mutants.append((dispatch, number, without(text, BARRIER, number)))
    assert len(mutants) >= 6
    compiler.build(parse(text) for _, _, text in mutants)
    unseen = {(short_name(d), n) for d, n, text in mutants if not re.search("data race|uninit", outcome(d, text))}
    assert unseen == SPARE[name]


DEFECTS = {
    "one row too many": ("first + row < source.rows", "first + row <= source.rows", "out of bounds"),
    "one key too many": ("key < row.high", "key <= row.high", "different"),
    "one key too few": ("key < row.high", "key < row.high - 1", "different"),
    "wrong row of the fragment": ("(lane / 2) % 4)", "(lane / 4) % 4)", "different|two writers|data race|uninit"),
    "sum of half the row": ("simd_shuffle_xor(x, ushort(8))", "simd_shuffle_xor(x, ushort(4))", "different"),
    "tile one row short": ("[BLOCK_KEYS * ", "[(BLOCK_KEYS - 1) * ", "out of bounds"),
    "forgotten scale": ("product * PRODUCT_SCALE", "product", "different"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_seen(name, dispatches):
    old, new, expected = DEFECTS[name]
    (dispatch,) = (d for d in dispatches["registers"] if short_name(d) == "forward")
    assert old in dispatch.kernel.text
    found = outcome(dispatch, dispatch.kernel.text.replace(old, new))
    assert re.search(expected, found), found
