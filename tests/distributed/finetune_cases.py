"""What ranks do in test_finetune_meshes.py: whole fine-tuning runs, beside those of one process."""

from __future__ import annotations

import json

import mlx.core as mx
from character_tokenizer import write_character_tokenizer
from finetune_runs import completions, labelled, settings, tagged, write
from small_models import save_small_model

from mlxlm.distributed import Joined, parse_mesh
from mlxlm.training.finetune import finetune

ROWS = {"labels": labelled, "tags": tagged}
# Of kinds other than words: the model, and what takes the dropout out of its configuration.
MODELS = {
    "quantized": ("quantized", {}),
    "tags": ("bert", {"vocab_size": 67, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "seq2seq": ("t5", {"vocab_size": 67, "dropout_rate": 0.0}),
}


def settings_of(folder, method, kind, name):
    return settings(
        folder / kind / "model", folder / kind / "data", folder / name, method=method, iters=2, batch_size=4,
        steps_per_eval=1, exact_match=1, seed=1, dtype="float32",
        # Where a gradient is all but zero, Adam divides its rounding by itself.
        **({"optimizer": "sgd", "learning_rate": 0.05} if method in ("full", "last-layers", "bitfit") else {}),
        **({"rank": 4} if method in ("lora", "dora", "qlora") else {}),
    )  # fmt: skip


def references(folder, cases):
    """Models and rows of each kind, and the run of one process for each method and kind."""
    for kind in {case.split(" ")[3] for case in cases}:
        name, changes = MODELS.get(kind, ("llama-tied", {}))
        target = folder / kind / "model"
        save_small_model(name, target, **changes)
        write_character_tokenizer(target)
        rows = ROWS.get(kind, completions)
        write(folder / kind / "data", train=rows(9, 1), valid=rows(3, 2), test=rows(2, 3))
    for method, kind in {(case.split(" ")[0], case.split(" ")[3]) for case in cases}:
        finetune(settings_of(folder, method, kind, f"{method}-{kind}"), say=lambda text: None)


PREPARE = {"runs": references}


def runs(world, folder, *cases):
    """For each case "method mesh zero kind": how far the result is from that of one process."""
    result = {}
    for number, case in enumerate(cases):
        method, mesh, zero, kind = case.split(" ")
        joined = Joined(world, parse_mesh(mesh, world.size), int(zero))
        made = settings_of(folder, method, kind, f"run-{number}")
        finetune(made, say=lambda text: None, joined=joined)
        if joined.first:
            result |= {f"{case}/{name}": value for name, value in compared(folder / f"{method}-{kind}", made).items()}
    return result


def compared(reference, made):
    """How far a run's adapter or model and its measures are from those of another."""
    pattern = "model.safetensors" if made.method == "full" else "adapter*.safetensors"
    one, other = (mx.load(str(next(folder.glob(pattern)))) for folder in (reference, made.folder))
    alone, shared = (json.loads((folder / "results.json").read_text()) for folder in (reference, made.folder))
    measures = [(alone[part][name], shared[part][name]) for part in ("before", "valid", "test") for name in alone[part]]
    return {
        "names": sorted(one) == sorted(other),
        "weights": max(float(mx.abs(array - other[name]).max()) for name, array in one.items()),
        "measures": max(abs(a - b) / max(abs(a), 1) for a, b in measures),
        "answers": alone["answers"] == shared["answers"],
        "moved": abs(alone["before"]["loss"] - alone["valid"]["loss"]),
    }
