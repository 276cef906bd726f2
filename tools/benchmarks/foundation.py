"""Import, help, first token and decode speed against mlx-lm, in one run on one machine.

usage: python tools/benchmarks/foundation.py CHECKPOINT [--repeats 5] [--tokens 64]

CHECKPOINT: a GGUF file or a Hugging Face directory of a decoder. A GGUF file is first written as a float32 directory,
which both programs then load. Every figure is the median of fresh processes, ours and mlx-lm's in turn. On Linux both
get the same BLAS: OpenBLAS is preloaded for mlx-lm when mlxlm finds one. Without mlx-lm its column stays empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlxlm
from mlxlm.runtime import load_blas

PROMPT = "Explain in three sentences why the sky is blue."

OURS = """
import json, sys, time
start = time.perf_counter()
import mlxlm
model, tokenizer = mlxlm.load(sys.argv[1], dtype="float32")
tokens = tokenizer.encode_chat([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True)
first = None
for piece in mlxlm.stream_generate(model, tokenizer, tokens, max_tokens=int(sys.argv[3]), stop_tokens=()):
    first = first or time.perf_counter() - start
print(json.dumps({"first": first, "decode": piece.decode_rate, "tokens": piece.generated_tokens}))
"""

THEIRS = """
import json, sys, time
start = time.perf_counter()
import mlx_lm
model, tokenizer = mlx_lm.load(sys.argv[1])
tokens = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True)
times = []
for piece in mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens=int(sys.argv[3])):
    times.append(time.perf_counter())
decode = (len(times) - 1) / (times[-1] - times[0])
print(json.dumps({"first": times[0] - start, "decode": decode, "tokens": len(times)}))
"""


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of a process."""
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def figures(code: str, arguments: list[str], environment: dict[str, str]) -> dict[str, float]:
    """What a snippet prints as JSON in its last line."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(result.stdout.strip().split("\n")[-1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.checkpoint
        if directory.suffix == ".gguf":
            model, tokenizer = mlxlm.load(directory, dtype="float32", quantized=False)
            directory = Path(folder) / "model"
            mlxlm.save(model, tokenizer, directory)
            del model
        report(directory, arguments.repeats, arguments.tokens)


def report(directory: Path, repeats: int, tokens: int) -> None:
    """Measure both programs in turn and print medians and ratios."""
    ours_env = dict(os.environ)
    ours_env["PYTHONPATH"] = os.pathsep.join([str(Path(mlxlm.__file__).parent.parent), ours_env.get("PYTHONPATH", "")])
    theirs_env = dict(os.environ)
    blas = load_blas()
    if blas.status == "loaded" and blas.name:
        theirs_env["LD_PRELOAD"] = blas.name
    rival = importlib.util.find_spec("mlx_lm") is not None
    python = sys.executable
    rows: dict[str, tuple[list[float], list[float]]] = {}

    def note(name: str, ours: float, theirs: float | None) -> None:
        rows.setdefault(name, ([], []))[0].append(ours)
        if theirs is not None:
            rows[name][1].append(theirs)

    bare = statistics.median(seconds([python, "-c", "pass"], ours_env) for _ in range(3))
    for _ in range(repeats):
        note(
            "import, s",
            seconds([python, "-c", "import mlxlm"], ours_env) - bare,
            seconds([python, "-c", "import mlx_lm"], theirs_env) - bare if rival else None,
        )
        note(
            "help, s",
            seconds([python, "-m", "mlxlm", "generate", "--help"], ours_env),
            seconds([python, "-m", "mlx_lm", "generate", "--help"], theirs_env) if rival else None,
        )
        inputs = [str(directory), PROMPT, str(tokens)]
        ours = figures(OURS, inputs, ours_env)
        theirs = figures(THEIRS, inputs, theirs_env) if rival else None
        note("first token, cold process, s", ours["first"], theirs and theirs["first"])
        note("decode, tokens/s", ours["decode"], theirs and theirs["decode"])
    print(f"{directory.name}, BLAS {blas.status} {blas.name or ''}, median of {repeats}, {tokens} tokens")
    print(f"{'':32}{'mlxlm':>10}{'mlx-lm':>10}{'ratio':>8}")
    for name, (ours_values, their_values) in rows.items():
        ours_median = statistics.median(ours_values)
        if their_values:
            their_median = statistics.median(their_values)
            print(f"{name:32}{ours_median:10.3f}{their_median:10.3f}{ours_median / their_median:8.2f}")
        else:
            print(f"{name:32}{ours_median:10.3f}{'-':>10}{'-':>8}")


if __name__ == "__main__":
    main()
