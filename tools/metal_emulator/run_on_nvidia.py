"""Run the kernels on an NVIDIA GPU: real threads, real barriers, and NVIDIA's memory and race checkers.

The text that would go to Apple's compiler is turned into CUDA (translate.to_cuda). One command does all of it; it can
be taken in two steps too, because a machine with a GPU need not have MLX:

    python tools/metal_emulator/run_on_nvidia.py                # both steps, through build/nvidia
    python tools/metal_emulator/run_on_nvidia.py export         # needs mlx and g++ or clang++; runs the emulator
    python tools/metal_emulator/run_on_nvidia.py run            # needs nvcc, a GPU and numpy, nothing else

`run` builds one program, runs every dispatch that the emulator ran on the same inputs, compares its outputs with the
emulator's and, where a dispatch writes a final result, with float64, and repeats the runs under compute-sanitizer
(memcheck and racecheck). It prints one table of all that, and exits with 1 when anything differs or is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Path(__file__).resolve().parent / "engine"
_LN2 = 0.6931471805599453
Errors = dict[tuple[str, str], list[float]]  # kernel, dtype -> dispatches, largest error from emulator, from float64
Check = tuple[str, str, bool]  # a tool, its verdict in a few words, whether it found nothing
# Largest error relative to the largest number of an output, by the output's type: rounding may fall the other way.
_AGAINST_EMULATOR = {"float": 2e-5, "half": 2e-3, "float16_t": 2e-3, "bfloat16_t": 1.6e-2}
# By name: the terms of a slope's gradient cancel, so it has the limit that the emulator's tests give it.
_CANCELLING = {"slope_gradient": 1e-4}
_AGAINST_EXACT = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}


# ---------------------------------------------------------------------------------------------------- export


def export(folder: Path) -> None:
    """Write the CUDA text of every kernel of the cases, and the inputs and outputs of every dispatch."""
    sys.path.insert(0, str(ROOT))
    from mlxlm.kernels.attention import metal
    from tools.metal_emulator import attention_cases as cases
    from tools.metal_emulator.translate import to_cuda

    chosen = [*cases.ALONE, *cases.DECODE, *cases.WIDTHS[::2], *cases.PAIRS]
    cases.build(chosen)
    runs = [(case, None) for case in chosen] + [(case, cases.CUT) for case in cases.FOR_CUTS]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names: dict[str, str] = {}
    index: list[dict[str, Any]] = []
    with open(folder / "data.bin", "wb") as file:
        data = _Data(file)
        for case, splits in runs:
            made = cases.make(case)
            with cases.emulated_attention(generation=case.generation, splits=splits, keeping=True) as device:
                cases.results(metal.attention, made)
            for dispatch in device.dispatches:
                name = names.setdefault(dispatch.kernel.digest, f"k{len(names):03d}")
                text = folder / f"{name}.cu"
                if not text.exists():
                    pointer = f"{{ return (const void*)metal::{name}_space::{name}; }}"
                    text.write_text(
                        f'#include "cuda_shim.cuh"\n{to_cuda(dispatch.kernel, name)}'
                        f'extern "C" const void* {name}_pointer() {pointer}\n'
                    )
                arguments = []
                for argument in dispatch.kernel.arguments:
                    if argument.kind == "attribute":
                        continue
                    buffer = dispatch.buffers[argument.name]
                    entry = {"name": argument.name, "type": argument.type, "bytes": buffer.nbytes}
                    entry["offset"] = data.add(buffer.tobytes())
                    exact = _exact(argument.name, made.exact) if argument.writable else None
                    if exact is not None and exact.size == buffer.size and not splits:
                        entry["exact"] = data.add(exact.astype(np.float32).tobytes())
                    arguments.append(entry | {"writable": argument.writable})
                index.append(
                    {
                        "kernel": name, "what": dispatch.name.removeprefix("mlxlm_attention_"),
                        "case": f"{case}{', in several launches' if splits else ''}",
                        "dtype": case.dtype, "grid": dispatch.grid, "threadgroup": dispatch.threadgroup,
                        "arguments": arguments,
                    }
                )  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    print(f"{len(runs)} cases, {len(names)} kernels, {len(index)} dispatches, {size:.1f} MiB in {folder}")


class _Data:
    """A file of buffers, in which equal ones are stored once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offsets: dict[bytes, int] = {}

    def add(self, content: bytes) -> int:
        """Offset of the content in the file."""
        digest = sha256(content).digest()
        if digest not in self._offsets:
            self._offsets[digest] = self._file.tell()
            self._file.write(content)
        return self._offsets[digest]


def _exact(name: str, exact: dict[str, np.ndarray]) -> np.ndarray | None:
    """The float64 result that an output of a kernel should hold, in the kernel's order of axes."""
    if name == "lse":
        return exact["lse"] / _LN2
    if name in ("relative_bias_gradient", "bias_gradient"):
        return exact[name.removesuffix("_gradient")]
    wanted = {"out": "out", "query_gradient": "query", "key_gradient": "key", "value_gradient": "value"}.get(name)
    return None if wanted is None else exact[wanted].transpose(0, 2, 1, 3)


# ------------------------------------------------------------------------------------------------------- run

_MAIN = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
%(declarations)s
static const void* (*const kernels[])() = {%(table)s};
static void check(cudaError_t status, int dispatch) {
  if (status == cudaSuccess) return;
  fprintf(stderr, "dispatch %%d: %%s\n", dispatch, cudaGetErrorString(status));
  exit(1);
}
// The list: kernel, grid, block, number of arguments; then bytes, offset in the data, and whether it is an output.
int main(int count, char** names) {
  FILE* list = fopen(names[1], "r");
  FILE* data = fopen(names[2], "rb");
  FILE* outputs = fopen(names[3], "wb");
  int kernel, arguments, dispatch = 0;
  unsigned g[3], b[3];
  while (fscanf(list, "%%d %%u %%u %%u %%u %%u %%u %%d", &kernel, g, g + 1, g + 2, b, b + 1, b + 2, &arguments) == 8) {
    std::vector<void*> device(arguments), pointers(arguments);
    std::vector<long> bytes(arguments);
    std::vector<int> writable(arguments);
    for (int i = 0; i < arguments; ++i) {
      long offset;
      if (fscanf(list, "%%ld %%ld %%d", &bytes[i], &offset, &writable[i]) != 3) return 2;
      std::vector<char> host(bytes[i], char(0xFF));
      if (!writable[i]) {
        fseek(data, offset, SEEK_SET);
        if (fread(host.data(), 1, bytes[i], data) != size_t(bytes[i])) return 2;
      }
      check(cudaMalloc(&device[i], bytes[i]), dispatch);
      check(cudaMemcpy(device[i], host.data(), bytes[i], cudaMemcpyHostToDevice), dispatch);
      pointers[i] = &device[i];
    }
    const dim3 grid(g[0], g[1], g[2]), block(b[0], b[1], b[2]);
    check(cudaLaunchKernel(kernels[kernel](), grid, block, pointers.data(), 0, 0), dispatch);
    check(cudaDeviceSynchronize(), dispatch);
    for (int i = 0; i < arguments; ++i) {
      if (writable[i]) {
        std::vector<char> host(bytes[i]);
        check(cudaMemcpy(host.data(), device[i], bytes[i], cudaMemcpyDeviceToHost), dispatch);
        fwrite(host.data(), 1, bytes[i], outputs);
      }
      check(cudaFree(device[i]), dispatch);
    }
    ++dispatch;
  }
  fclose(outputs);
  printf("%%d dispatches\n", dispatch);
  return 0;
}
"""


def run(folder: Path, *, sanitize: bool, jobs: int) -> int:
    """Build, run, compare, sanitize. Returns the exit status."""
    if not (folder / "index.json").exists():
        raise SystemExit(f"{folder} holds no export; make one with: {Path(__file__).name} export {folder}")
    index = json.loads((folder / "index.json").read_text())
    start = time.monotonic()
    program = _build(folder, jobs)
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    command = [str(program), str(folder / "list.txt"), str(folder / "data.bin"), str(folder / "outputs.bin")]
    _write_list(folder, index)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout + done.stderr, end="")
        return 1
    worst, wrong = _compare(folder, index)
    checks = [_sanitize(tool, command) for tool in (("memcheck", "racecheck") if sanitize else ())]
    _print_table(folder, index, worst, checks)
    good = not wrong and all(clean for *_, clean in checks)
    print("\n".join([*wrong, "all good" if good else "FAILED"]))
    return 0 if good else 1


def _print_table(folder: Path, index: list[dict[str, Any]], worst: Errors, checks: list[Check]) -> None:
    device = _call(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).strip()
    compiler = _call(["nvcc", "--version"]).split("release ")[-1].split(",")[0]
    cases, kernels = len({entry["case"] for entry in index}), len(list(folder.glob("k*.cu")))
    print(f"\n{time.strftime('%Y-%m-%d')}, {device}, CUDA {compiler}")
    print(f"{cases} cases, {kernels} kernels, {len(index)} dispatches")
    print(f"{'kernel':24}{'dtype':10}{'dispatches':>11}{'from emulator':>15}{'from float64':>14}")
    for (what, dtype), (count, emulator, exact) in sorted(worst.items()):
        print(f"{what:24}{dtype:10}{count:11}{emulator:15.1e}{f'{exact:.1e}' if exact else '-':>14}")
    for tool, verdict, _ in checks:
        print(f"{tool:24}{'all':10}{len(index):11}  {verdict}")


def _build(folder: Path, jobs: int) -> Path:
    names = sorted(path.stem for path in folder.glob("k*.cu"))
    table = ", ".join(f"{name}_pointer" for name in names)
    declarations = "\n".join(f'extern "C" const void* {name}_pointer();' for name in names)
    (folder / "main.cu").write_text(_MAIN % {"declarations": declarations, "table": table})
    flags = ["-std=c++17", "-O2", "-lineinfo", "-w", f"-arch={_architecture()}", "-I", str(ENGINE)]

    def compile_one(name: str) -> None:
        target = folder / f"{name}.o"
        if not target.exists():
            _call(["nvcc", *flags, "-c", str(folder / f"{name}.cu"), "-o", str(target)])

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, [*names, "main"]))
    program = folder / "program"
    _call(["nvcc", *flags, *(str(folder / f"{name}.o") for name in [*names, "main"]), "-o", str(program)])
    print(f"built {len(names)} kernels")
    return program


def _architecture() -> str:
    """The GPU's own architecture, or a common one where there is no GPU to ask (to check that it builds)."""
    found = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
    ) if shutil.which("nvidia-smi") else None  # fmt: skip
    if found is None or found.returncode != 0 or not found.stdout.strip():
        return "sm_90"
    return "sm_" + found.stdout.splitlines()[0].strip().replace(".", "")


def _write_list(folder: Path, index: list[dict[str, Any]]) -> None:
    lines = []
    for entry in index:
        blocks = [g // t for g, t in zip(entry["grid"], entry["threadgroup"], strict=True)]
        numbers = [int(entry["kernel"][1:]), *blocks, *entry["threadgroup"], len(entry["arguments"])]
        for argument in entry["arguments"]:
            numbers += [argument["bytes"], argument["offset"], int(argument["writable"])]
        lines.append(" ".join(map(str, numbers)))
    (folder / "list.txt").write_text("\n".join(lines) + "\n")


def _compare(folder: Path, index: list[dict[str, Any]]) -> tuple[Errors, list[str]]:
    """The largest errors, and a line for everything that is wrong."""
    data, outputs = (folder / "data.bin").read_bytes(), (folder / "outputs.bin").read_bytes()
    expected = sum(argument["bytes"] for entry in index for argument in entry["arguments"] if argument["writable"])
    if len(outputs) != expected:
        return {}, [f"BAD the program wrote {len(outputs)} bytes; expected {expected}"]
    worst: Errors = {}
    wrong, position = [], 0
    for entry in index:
        row = worst.setdefault((entry["what"], entry["dtype"]), [0, 0.0, 0.0])
        row[0] += 1
        for argument in entry["arguments"]:
            if not argument["writable"]:
                continue
            size, kind = argument["bytes"], argument["type"]
            found = _decode(outputs[position : position + size], kind)
            position += size
            error = _error(found, _decode(data[argument["offset"] : argument["offset"] + size], kind))
            row[1] = max(row[1], error)
            bad = not error <= _CANCELLING.get(argument["name"], _AGAINST_EMULATOR[kind])
            if "exact" in argument:
                start = argument["exact"]
                exact_error = _error(found, _decode(data[start : start + 4 * found.size], "float"))
                row[2] = max(row[2], exact_error)
                bad |= not exact_error <= _AGAINST_EXACT[entry["dtype"]]
            if bad:
                name = f"{entry['what']}.{argument['name']}"
                wrong.append(f"BAD {name} of {entry['case']}: {error:.1e} from the emulator")
    return worst, wrong


def _decode(raw: bytes, kind: str) -> np.ndarray:
    if kind == "bfloat16_t":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, np.float32 if kind == "float" else np.float16).astype(np.float64)


def _error(found: np.ndarray, right: np.ndarray) -> float:
    """Largest difference relative to the largest number; infinite where one is NaN or an infinity is misplaced."""
    finite = np.isfinite(right)
    if not np.array_equal(found[~finite], right[~finite]) or not np.isfinite(found[finite]).all():
        return float("inf")
    scale = float(np.abs(right[finite]).max(initial=0.0)) or 1.0
    return float(np.abs(found[finite] - right[finite]).max(initial=0.0)) / scale


def _sanitize(tool: str, command: Sequence[str]) -> Check:
    if not shutil.which("compute-sanitizer"):
        return tool, "compute-sanitizer is not installed", False
    start = time.monotonic()
    done = subprocess.run(["compute-sanitizer", "--tool", tool, *command], capture_output=True, text=True)
    summary = [line.strip(" =") for line in done.stdout.splitlines() if "SUMMARY" in line]
    clean = bool(summary) and all(re.search(r"SUMMARY: 0 (errors|hazards)", line) for line in summary)
    if not clean:
        print(done.stdout[:6000] + done.stderr[-2000:])
    found = "; ".join(line.partition("SUMMARY: ")[2] for line in summary) or f"no verdict, exit {done.returncode}"
    return tool, f"{found}, {time.monotonic() - start:.0f} s", clean and done.returncode == 0


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=("all", "export", "run"), default="all")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "nvidia")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave out compute-sanitizer")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    given = parser.parse_args()
    if given.step != "run":
        export(given.folder)
    return 0 if given.step == "export" else run(given.folder, sanitize=not given.no_sanitizer, jobs=given.jobs)


if __name__ == "__main__":
    sys.exit(main())
