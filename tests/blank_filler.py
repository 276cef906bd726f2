"""A small random checkpoint of a model that fills blanks, in the layout of the original code."""

from __future__ import annotations

from typing import Any

import numpy as np

WORDS = ["[CLS]", "<|endoftext|>", "[MASK]", "[sMASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>", "<unk>"]
WORDS += [*"abcdefghijklmnopqrstuvwxyz .,"]


def config() -> dict[str, Any]:
    """The config.json of `tiny_blank_directory`, as the original code writes it."""
    return {
        "architectures": ["GLMModel"],
        "model_type": "glm",
        "block_position_encoding": True,
        "relative_encoding": False,
        "output_predict": True,
        "attention_scale": 1.0,
        "attention_dropout_prob": 0.1,
        "embedding_dropout_prob": 0.1,
        "output_dropout_prob": 0.1,
        "hidden_size": 20,
        "num_attention_heads": 5,
        "num_layers": 2,
        "max_sequence_length": 40,
        "layernorm_epsilon": 1e-4,
        "vocab_size": len(WORDS) + 2,
        "checkpoint_activations": False,
        "checkpoint_num_layers": 1,
        "parallel_output": True,
        "pool_token": "cls",
        "spell_func": "lstm",
        "spell_length": None,
        "torch_dtype": "float32",
    }


def weights() -> dict[str, Any]:
    """Every tensor of `tiny_blank_directory` by its name on disk, as numpy arrays."""
    values, draw = config(), np.random.default_rng(5)
    dim, longest = values["hidden_size"], values["max_sequence_length"]
    shapes = {"word_embeddings.weight": (values["vocab_size"], dim)}
    for name in ("position_embeddings", "block_position_embeddings"):
        shapes[f"transformer.{name}.weight"] = (longest + 1, dim)
    norms = ["transformer.final_layernorm"]
    for layer in range(values["num_layers"]):
        prefix = f"transformer.layers.{layer}."
        linears = {
            "attention.query_key_value": (3 * dim, dim),
            "attention.dense": (dim, dim),
            "mlp.dense_h_to_4h": (4 * dim, dim),
            "mlp.dense_4h_to_h": (dim, 4 * dim),
        }
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"], shapes[f"{prefix}{name}.bias"] = shape, shape[:1]
        norms += [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
    shapes |= {f"{name}.{part}": (dim,) for name in norms for part in ("weight", "bias")}
    return {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
