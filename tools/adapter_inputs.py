"""Inputs of the adapter fixtures, for a transformers model of any shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

LENGTH, PADDED, DECODED = 9, 6, 5


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
