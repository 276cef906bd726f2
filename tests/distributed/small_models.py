"""Models small enough to be trained on several processes of a test, one for every mechanism that is shared."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from processes import ROOT

# What is changed in the configuration of a parity fixture so that two ranks, and mostly four, can share the heads.
CHANGES = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8},
    "llama-tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "falcon": {"num_attention_heads": 4, "hidden_size": 40},
    "bloom": {"n_head": 6},
    "gpt2": {"n_head": 6},
    "bert": {"num_attention_heads": 6},
    "t5": {"num_heads": 4},
    "quantized": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128,
                  "head_dim": 32},
}  # fmt: skip


def config_values(name, **changes):
    """The values of the config.json of a small model."""
    fixture = {"quantized": "llama"}.get(name, name)
    values = json.loads((ROOT / "tests" / "fixtures" / "models" / fixture / "config.json").read_text())
    return {**values, **CHANGES[name], **changes}


def small_model(name, **changes):
    """A model in evaluation mode, without dropout, whose weights all are drawn, biases and norms too."""
    from mlxlm.models import Transformer, family_of

    values = config_values(name, **changes)
    model = Transformer(family_of(values).read_config(values))
    rng = np.random.default_rng(5)
    drawn = [
        (key, mx.array(rng.normal(1.0 if "norm" in key and key.endswith("weight") else 0, 0.15, array.shape)
                       .astype(np.float32)))
        for key, array in sorted(tree_flatten(model.parameters()))
    ]  # fmt: skip
    model.update(tree_unflatten(drawn))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module._p_1 = 1
        if hasattr(module, "spec") and getattr(module.spec, "dropout", 0) and hasattr(module, "query"):
            object.__setattr__(module.spec, "dropout", 0.0)
    if name == "quantized":
        nn.quantize(model, group_size=32, bits=4)
    return model.eval()


def save_small_model(name, folder, **changes):
    """A checkpoint of a small model, in a folder of its own."""
    from mlxlm.models import family_of, save
    from mlxlm.models.source import Source

    model, values = small_model(name, **changes), config_values(name, **changes)
    folder.mkdir(parents=True)
    model.source = Source(family=family_of(values), path=folder, values=values, config=model.config)
    save(model, None, folder)


def batch_of(model, rows=4, length=12, seed=0):
    """A batch with padding, as an objective would make it."""
    rng = np.random.default_rng(seed)
    words = model.config.embeddings.vocab_size
    tokens = rng.integers(1, words, (rows, length)).astype(np.int32)
    lengths = rng.integers(length // 2, length + 1, rows).astype(np.int32)
    targets = rng.integers(0, words, (rows, length)).astype(np.int32)
    targets[np.arange(length)[None] >= lengths[:, None]] = -100
    batch = {"tokens": tokens, "targets": targets, "key_lengths": lengths}
    if model.config.has_memory:
        start = np.full((rows, 1), model.config.decoder_start, dtype=np.int32)
        answers = rng.integers(1, words, (rows, 7)).astype(np.int32)
        batch |= {"targets": answers, "decoder_tokens": np.concatenate([start, answers[:, :-1]], axis=1)}
    elif model.config.decoder is None:
        targets[rng.random(targets.shape) < 0.8] = -100
    return batch
