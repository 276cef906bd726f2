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
