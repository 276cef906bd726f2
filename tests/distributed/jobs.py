"""What several ranks do one thing after another, in one start of the processes.

A job is a function of a `*_cases.py` with its arguments; the module may have `PREPARE`, functions by its name that make
what the ranks find in their folder.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from processes import run_ranks

TRAINED = ["llama dp=2 0", "llama dp=2 3", "llama tp=2 0", "llama pp=2 0", "llama sp=2 0", "bert tp=2 0", "t5 dp=2 2"]
TUNED = ["lora dp=2 2 words", "lora tp=2 0 words", "lora pp=2 0 words"]
SENT = ["llama dp=2 3 1", "llama tp=2 0 1", "llama-tied pp=2 0 2"]
LOADED = ["llama tp=2 0", "quantized tp=2 0", "gpt2 tp=2 0", "falcon tp=2 0", "llama dp=2 3"]
SHARED = ["llama", "llama-tied", "qwen3", "falcon", "bloom", "gpt2", "bert", "t5", "quantized"]

# What takes longer.
TRAINED_MORE = [
    "llama dp=2 1", "llama dp=2 2", "llama-tied pp=2 0 gpipe", "bert dp=2 0", "bert dp=2 1", "bert dp=2 2",
    "bert dp=2 3", "bert pp=2 0", "bert pp=2 0 gpipe", "bert sp=2 0", "t5 dp=2 0", "t5 dp=2 1", "t5 dp=2 3",
    "t5 tp=2 0", "t5 pp=2 0", "t5 pp=2 0 gpipe", "t5 sp=2 0", "bloom sp=2 0", "gpt2 sp=2 3",
]  # fmt: skip
TRAINED_FOUR = [
    "llama dp=2,tp=2 2", "qwen3 dp=2,tp=2 3", "llama-tied pp=2,dp=2 2", "llama pp=2,tp=2 0 gpipe", "bert dp=2,tp=2 1",
    "bert pp=2,dp=2 0", "t5 pp=2,tp=2 0", "t5 pp=2,dp=2 3", "llama sp=2,tp=2 0", "llama-tied sp=2,pp=2 0",
    "bert sp=4 0",
]  # fmt: skip
TRAINED_EIGHT = ["llama dp=2,tp=2,pp=2 1"]
TUNED_MORE = [
    "lora dp=2 3 words", "lora sp=2 0 words", "full dp=2 2 words", "full tp=2 0 words", "full pp=2 0 words",
    "full sp=2 0 words", "dora tp=2 0 words", "ia3 tp=2 0 words", "ia3 dp=2 3 words", "prompt tp=2 0 words",
    "p-tuning dp=2 1 words", "prefix dp=2 3 words", "last-layers pp=2 0 words", "houlsby tp=2 0 words",
    "pfeiffer pp=2 0 words", "qlora tp=2 0 quantized", "qlora pp=2 0 quantized", "qlora dp=2 3 quantized",
    "lora pp=2 0 labels", "lora tp=2 0 labels", "full dp=2 3 labels", "bitfit tp=2 0 tags", "lora pp=2 0 tags",
    "lora tp=2 0 seq2seq", "lora pp=2 0 seq2seq", "lora sp=2 0 seq2seq", "full dp=2 3 seq2seq",
]  # fmt: skip
TUNED_FOUR = ["lora dp=2,tp=2 2 words", "lora pp=2,dp=2 3 words", "full pp=2,tp=2 0 labels"]
SENT_MORE = [
    "llama dp=2 0 2", "llama sp=2 0 1", "llama dp=2 1 2", "llama dp=2 2 2", "llama dp=2 2 1", "qwen3 dp=2 3 2",
    "llama tp=2 0 2", "qwen3 tp=2 0 1", "t5 tp=2 0 1", "bert tp=2 0 1", "t5 pp=2 0 2", "t5 dp=2 3 1", "gpt2 sp=2 3 2",
]  # fmt: skip
SENT_FOUR = [
    "llama tp=4 0 1", "qwen3 dp=2,tp=2 2 2", "llama-tied pp=2,tp=2 0 2", "llama pp=2,sp=2 0 2",
    "llama pp=2,dp=2 2 2",
]  # fmt: skip
MEASURED_FOUR = ["dp=4 3", "tp=4 0", "dp=2,tp=2 3", "pp=2,tp=2 0"]

# By name: module, function, arguments.
TWO = {
    "collectives": ("communication_cases", "collectives", ["all"]),
    "gradients": ("communication_cases", "gradients", []),
    "shared": ("tensor_cases", "shared", SHARED),
    "stages": ("tensor_cases", "generating", ["pp=2", "llama", "gpt2", "t5"]),
    "trained": ("training_cases", "under_meshes", TRAINED),
    "tuned": ("finetune_cases", "runs", TUNED),
    "loaded": ("loading_cases", "parts", LOADED),
    "ring": ("ring_cases", "exact", []),
    "refused": ("memory_cases", "refused", []),
    "memory": ("memory_cases", "measured", ["dp=2 0", "dp=2 1", "dp=2 3", "tp=2 0"]),
    # The last, as it changes how all communicators count.
    "traffic": ("traffic_cases", "bytes_of_a_step", SENT),
}


SLOW = {
    1: {"memory": ("memory_cases", "measured", ["dp=1 0"]), "peak": ("ring_cases", "peak", ["2048"])},
    2: {
        "trained": ("training_cases", "under_meshes", TRAINED_MORE),
        "tuned": ("finetune_cases", "runs", TUNED_MORE),
        "peak": ("ring_cases", "peak", ["2048"]),
        "traffic": ("traffic_cases", "bytes_of_a_step", SENT_MORE),
    },
    3: {"ring": ("ring_cases", "exact", [])},
    4: {
        "shared": ("tensor_cases", "shared", ["llama", "t5", "falcon"]),
        "stages": ("tensor_cases", "generating", ["pp=2,tp=2", "llama", "t5"]),
        "trained": ("training_cases", "under_meshes", TRAINED_FOUR),
        "tuned": ("finetune_cases", "runs", TUNED_FOUR),
        "memory": ("memory_cases", "measured", MEASURED_FOUR),
        "peak": ("ring_cases", "peak", ["2048"]),
        "traffic": ("traffic_cases", "bytes_of_a_step", SENT_FOUR),
    },
    8: {"trained": ("training_cases", "under_meshes", TRAINED_EIGHT)},
}  # fmt: skip


def run(count, jobs, limit=120, **options):
    """What each of the jobs gave, by its name.  options: of `run_ranks`."""

    def prepare(folder):
        for name, (module, function, arguments) in jobs.items():
            make = getattr(importlib.import_module(module), "PREPARE", {}).get(function)
            if make is not None:
                (folder / name).mkdir()
                make(folder / name, arguments)

    results = run_ranks(count, "jobs", "all_of_them", json.dumps(jobs), limit=limit, prepare=prepare, **options)
    return {name: [named(got, name) for got in results] for name in jobs}


def named(arrays, name):
    """What one job gave."""
    return {key.removeprefix(f"{name}|"): array for key, array in arrays.items() if key.startswith(f"{name}|")}


def all_of_them(world, folder, jobs):
    """Every job in turn, on each rank."""
    result = {}
    for name, (module, function, arguments) in json.loads(jobs).items():
        found = getattr(importlib.import_module(module), function)(world, Path(folder) / name, *arguments)
        result |= {f"{name}|{key}": value for key, value in (found or {}).items()}
    return result
