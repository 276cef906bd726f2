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
from mlxlm.models import Transformer, family_of, save
from mlxlm.training import Console
from mlxlm.training.finetune import FinetuneSettings, Outcome, finetune
from mlxlm.training.initialisation import initialise

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


def taught(folder: Path, data: Path, **settings: Any) -> None:
    """Teach a model of `make_model` by rows of prompts and completions, several of which stand in a row of 64 tokens;
    folder/base is what comes out.

    settings: of fine-tuning, such as epochs.
    """
    if _is_there(folder):
        return
    make_model(folder / "drawn", seed=settings.get("seed", 0))
    _finetuned(folder, data, settings)


def taught_to(folder: Path, data: Path, loss: float, *, step: int, most: int, **settings: Any) -> None:
    """As `taught`, until the loss on the validation rows is below `loss`: looked at every `step` updates, `most` of
    them at most.
    """
    if _is_there(folder):
        return
    make_model(folder / "drawn", seed=settings.get("seed", 0))
    for iters in range(step, most + 1, step):
        found = _finetuned(folder, data, {**settings, "iters": iters}, resume=iters > step).valid["loss"]
        print(f"taught {iters} steps: validation loss {found:.3f}, wanted {loss:g}", file=sys.stderr)
        if found < loss:
            return


def _is_there(folder: Path) -> bool:
    return (folder / "base" / "config.json").is_file()


def _finetuned(folder: Path, data: Path, settings: dict[str, Any], resume: bool = False) -> Outcome:
    chosen = FinetuneSettings.from_json({
        "model": str(folder / "drawn"), "data": str(data), "adapter_path": str(folder / "base"), "method": "full",
        "learning_rate": 3e-3, "batch_size": 8, "packing": True, "max_seq_length": 64, "samples": 0, "exact_match": 0,
        "schedule": "constant", "steps_per_report": 50, "steps_per_eval": 0, "valid_fraction": 0.0, **settings,
    })  # fmt: skip
    return finetune(chosen, [Console()], resume=resume, say=lambda text: None)


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """A data folder with the rows of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
