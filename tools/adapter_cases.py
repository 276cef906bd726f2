"""What the scripts of adapter fixtures share: cases, inputs for a transformers model of any shape, and the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
LENGTH, PADDED, DECODED = 9, 6, 5


@dataclass(frozen=True)
class Case:
    """One fixture. base: a fixture model. config: a config class of the library. settings: its arguments."""

    base: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)


def seed_of(name: str) -> int:
    """The seed of a fixture; sets torch's too."""
    seed = sum(map(ord, name))
    torch.manual_seed(seed)
    return seed


def base_values(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a fixture model, and its config.json."""
    folder = FIXTURES / "models" / name
    return folder, json.loads((folder / "config.json").read_text())


def name_base(folder: Path, **names: str) -> None:
    """Write into an adapter's config what its base is called here."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | names, indent=2) + "\n")


def write_expected(folder: Path, inputs: dict[str, np.ndarray], model: Any) -> None:
    """Write inputs and logits of a model that was loaded again, as others will: what the file holds is what counts."""
    save_file({**inputs, "logits": logits_of(model, inputs)}, folder / "expected.safetensors")


def logits_of(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What a model answers to the inputs, for the given tokens alone, in its own precision."""
    with torch.no_grad():
        logits = model(**arguments_for(inputs)).logits
    length = (inputs["decoder_tokens"] if "decoder_tokens" in inputs else inputs["tokens"]).shape[1]
    # Contiguous: safetensors would write the memory of a view as it lies.
    return (logits if logits.ndim == 2 else logits[:, -length:]).contiguous().numpy()


def make_named(make: Callable[[str, Case], None], cases: Mapping[str, Case]) -> None:
    """Make the fixtures named on the command line, or all."""
    for name in sys.argv[1:] or cases:
        make(name, cases[name])
        print(name)


def inputs_for(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tokens, lengths and, for an encoder-decoder, tokens of the decoder."""
    vocabulary = model.config.vocab_size
    inputs = {
        "tokens": rng.integers(3, vocabulary, (2, LENGTH)).astype(np.int32),
        "lengths": np.array([LENGTH, PADDED], np.int32),
    }
    if getattr(model.config, "pad_token_id", None) is not None:
        inputs["tokens"][1, PADDED:] = model.config.pad_token_id  # by which heads that read the last token find it
    if model.config.is_encoder_decoder:
        inputs["decoder_tokens"] = rng.integers(3, vocabulary, (2, DECODED)).astype(np.int32)
    return inputs


def arguments_for(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The inputs as a transformers model takes them."""
    tokens = torch.tensor(inputs["tokens"]).long()
    arguments = {
        "input_ids": tokens,
        "attention_mask": (torch.arange(tokens.shape[1]) < torch.tensor(inputs["lengths"])[:, None]).long(),
    }
    if "decoder_tokens" in inputs:
        arguments["decoder_input_ids"] = torch.tensor(inputs["decoder_tokens"]).long()
    return arguments
