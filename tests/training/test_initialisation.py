"""Weights that are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from mlxlm.models import Transformer, family_of
from mlxlm.training.initialisation import initialise

T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 300, "d_model": 64, "d_kv": 16,
    "d_ff": 96, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2, "feed_forward_proj": "relu",
}  # fmt: skip
GPT = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 50}


def drawn(values, seed=0):
    from mlx.utils import tree_flatten

    model = Transformer(family_of(values).read_config(values))
    initialise(model, seed)
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize(
    ("values", "name", "deviation"),
    [
        (GPT, "embeddings.token.weight", 0.02),
        (GPT, "decoder.layers.1.attention.query.weight", 0.02),
        (GPT, "decoder.layers.1.feed_forward.down.weight", 0.02 / 6**0.5),
        (T5, "embeddings.token.weight", 1.0),  # its logits are divided by 8
        (T5, "encoder.layers.0.attention.query.weight", (64 * 16) ** -0.5),
        (T5, "decoder.layers.0.cross_attention.key.weight", 64**-0.5),
        (T5, "decoder.layers.0.feed_forward.down.weight", 96**-0.5),
        (T5, "decoder.positions.weight", 64**-0.5),
        ({**T5, "tie_word_embeddings": False}, "embeddings.token.weight", 1.0),
        ({**T5, "tie_word_embeddings": False}, "head.output.weight", 64**-0.5),
        (
            {**T5, "model_type": "umt5", "architectures": ["UMT5ForConditionalGeneration"]},
            "embeddings.token.weight",
            1.0,
        ),
        ({**GPT, "scale_attn_weights": False}, "decoder.layers.1.attention.query.weight", 0.02),
    ],
    ids=str,
)
def test_weights_have_their_deviation(values, name, deviation):
    array = drawn(values)[name]
    few = array.size < 1000
    assert array.std() == pytest.approx(deviation, rel=0.2 if few else 0.05)
    assert abs(array.mean()) < deviation / (5 if few else 20)


def test_biases_are_zero_and_norms_the_identity():
    weights = drawn(GPT)
    assert not weights["decoder.layers.0.attention.query.bias"].any()
    assert (weights["decoder.norm.weight"] == 1).all()
    assert not weights["decoder.norm.bias"].any()


def test_a_deeper_model_has_the_same_first_layers_and_another_seed_other_ones():
    small, deep, other = drawn(GPT), drawn({**GPT, "n_layer": 4}), drawn(GPT, seed=1)
    name = "decoder.layers.2.attention.key.weight"
    assert np.array_equal(small[name], deep[name])
    assert not np.array_equal(small[name], other[name])
