"""What the tests of fine-tuning share: data files, settings of tiny runs, and a loss computed by hand."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np

from mlxlm.training import MetricsFile
from mlxlm.training.finetune import FinetuneSettings, finetune

WORDS = "the cat sat on a mat and saw that dogs run far away from home".split()


def write(folder, **splits):
    """A data folder with the rows of each split."""
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sentences(count, seed=0, least=2, most=7):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, int(rng.integers(least, most)))) for _ in range(count)]


def completions(count, seed=0):
    """Rows of many lengths; the answer is the first word."""
    return [{"prompt": text, "completion": text.split()[0]} for text in sentences(count, seed)]


def labelled(count, seed=0):
    """Rows whose label is whether there is a cat."""
    texts = sentences(count, seed)
    return [{"text": text, "label": "cat" if "cat" in text else "none"} for text in texts]


def tagged(count, seed=0):
    """Rows whose words are tagged by their first letter."""
    return [
        {"tokens": text.split(), "labels": ["B-T" if word[0] == "t" else "O" for word in text.split()]}
        for text in sentences(count, seed)
    ]


def settings(model, data, folder, **changes):
    """Settings of a short, quiet run."""
    values = {
        "model": str(model), "data": str(data), "adapter_path": str(folder), "iters": 2, "batch_size": 3, "samples": 1,
        "sample_tokens": 4, "steps_per_report": 1, "steps_per_eval": 0, "exact_match": 2, "schedule": "constant",
    }  # fmt: skip
    return FinetuneSettings.from_json({**values, **changes})


def run(made, **options):
    """The outcome of settings; what is said is kept in `said`."""
    said = []
    outcome = finetune(made, [MetricsFile(made.folder)], say=said.append, **options)
    return outcome, "\n".join(said)


def log_probability(model, tokens, scored):
    """Sum over the scored tokens of -log p(token | those before it), and their number, in float64, of one row alone."""
    logits = np.array(model(mx.array([tokens]))[0], dtype=np.float64)
    log_p = logits - logits.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    places = [place for place in range(1, len(tokens)) if scored[place]]
    return -sum(log_p[place - 1, tokens[place]] for place in places), len(places)


def mean_loss(model, rows):
    """Mean over all scored tokens of all rows, each (tokens, scored)."""
    total, count = (sum(column) for column in zip(*(log_probability(model, *row) for row in rows), strict=True))
    return total / count
