"""Rows and the settings of short, quiet runs of alignment."""

from __future__ import annotations

import json

import numpy as np

from mlxlm.alignment import AlignSettings

WORDS = "the cat sat on a mat and saw that dogs run far away from home".split()


def write(folder, **splits):
    """A data folder with the rows of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, int(rng.integers(2, 6)))) for _ in range(count)]


def pairs(count, seed=0):
    return [{"prompt": text, "chosen": " a cat", "rejected": " no dogs here"} for text in texts(count, seed)]


def singles(count, seed=0):
    return [
        {"prompt": text, "completion": " a cat" if i % 2 else " no dogs", "label": bool(i % 2)}
        for i, text in enumerate(texts(count, seed))
    ]


def prompts(count, seed=0):
    return [{"prompt": text} for text in texts(count, seed)]


def rows_for(method, count, seed=0):
    if method == "kto":
        return singles(count, seed)
    return prompts(count, seed) if method in ("ppo", "grpo", "dr-grpo", "dapo") else pairs(count, seed)


def settings_for(method, model, data, folder, **changes):
    values = {
        "method": method, "model": str(model), "data": str(data), "adapter_path": str(folder), "iters": 4,
        "batch_size": 3, "samples": 1, "steps_per_report": 1, "steps_per_eval": 2, "answers": 2, "learning_rate": 1e-3,
        "schedule": "constant",
    }  # fmt: skip
    if method in ("ppo", "grpo", "dr-grpo", "dapo"):
        values |= {"reward": "regex:[a-m]", "prompts_per_iteration": 2, "answers_per_prompt": 3, "max_tokens": 4}
    elif method != "reward":
        values["max_tokens"] = 4
    return AlignSettings.from_json({**values, **changes})
