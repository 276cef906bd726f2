"""A small decoder that reads characters, made from nothing and taught by supervised fine-tuning: what alignment begins
with in these examples.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import mlxlm
from mlxlm.data import Encoding, SupervisedSource, encode_rows, read_splits
from mlxlm.models import Transformer, family_of, save
from mlxlm.training import Console, TrainSettings, WordLoss, evaluate
from mlxlm.training.finetune import FinetuneSettings, finetune
from mlxlm.training.initialisation import initialise
from mlxlm.training.step import Step

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789+-*=.,:?! "


def make_model(folder: Path, *, width: int = 64, layers: int = 2, length: int = 64, seed: int = 0) -> None:
    """Write a decoder with drawn weights and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<pad>", "</s>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    values: dict[str, Any] = {
        "model_type": "llama", "vocab_size": len(words), "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "max_position_embeddings": length, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    model = Transformer(family_of(values).read_config(values))
    initialise(model, seed)
    save(model, None, folder, family="llama")
    mlxlm.load(folder)


def taught(folder: Path, data: Path, *, epochs: int, learning_rate: float = 3e-3, batch_size: int = 64) -> None:
    """Teach a model of `make_model` by rows of prompts and completions; folder/base is what comes out."""
    if (folder / "base" / "config.json").is_file():
        return
    make_model(folder / "drawn")
    settings = FinetuneSettings.from_json({
        "model": str(folder / "drawn"), "data": str(data), "adapter_path": str(folder / "base"), "method": "full",
        "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "samples": 0, "exact_match": 0,
        "schedule": "constant", "steps_per_report": 50, "steps_per_eval": 0, "valid_fraction": 0.0,
    })  # fmt: skip
    finetune(settings, [Console()], say=lambda text: None)


def taught_to(
    folder: Path, data: Path, loss: float, *, seed: int = 0, most: int = 6000, learning_rate: float = 3e-3
) -> None:
    """As `taught`, but until the loss a token of the validation rows is below `loss`, looked at every 20 updates; after
    `most` of them in any case. Several examples stand in a row of 64 tokens, and 8 rows in a batch.
    """
    if (folder / "base" / "config.json").is_file():
        return
    make_model(folder / "drawn", seed=seed)
    model, tokenizer = mlxlm.load(folder / "drawn")
    examples = {
        split: encode_rows(rows, tokenizer, Encoding(max_length=64))[0]
        for split, rows in read_splits(str(data)).items()
    }
    source = SupervisedSource(examples["train"], 8, max_length=64, packing=True, seed=seed)
    settings = TrainSettings(steps=most, learning_rate=learning_rate, warmup_steps=50, schedule="constant")
    step = Step(model, WordLoss(), settings)
    for number in range(most):
        outcome = step([source.next()], settings.rate(number))
        step.evaluate_state()
        if (number + 1) % 20:
            continue
        valid = SupervisedSource(examples["valid"], 8, max_length=64, packing=True, epochs=1, shuffle=False)
        found = evaluate(step, valid).loss
        if (number + 1) % 100 == 0 or found < loss:
            learned = (outcome.loss / outcome.count).item()
            print(f"taught {number + 1} steps: loss {learned:.3f}, of validation rows {found:.3f}", file=sys.stderr)
        if found < loss:
            break
    step.close()
    save(model, tokenizer, folder / "base")


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """A data folder with the rows of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
