"""What the configs of encoder-decoder families mean in either dialect, and older names of their weights."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

import mlxlm
from mlxlm.errors import ConfigError, UnsupportedModelError
from mlxlm.layers import NoPositionsSpec, RelativeBucketsSpec
from mlxlm.models import family, load_model
from mlxlm.models.hub_config import HubConfig


def rewrite(directory, drop=(), **changes):
    """Change the config.json of a checkpoint."""
    values = json.loads((directory / "config.json").read_text())
    values = {key: value for key, value in {**values, **changes}.items() if key not in drop}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def logits(directory, expected):
    tokens, decoder = mx.array(expected["tokens"]), mx.array(expected["decoder_tokens"])
    model = load_model(directory)
    return np.array(model(tokens, decoder_tokens=decoder, key_lengths=mx.array(expected["lengths"])))


# What transformers 5 derives from the other keys, and version 4 doesn't write.
NEWER = ("scale_decoder_outputs", "dense_act_fn", "is_gated_act", "dtype", "is_decoder", "classifier_dropout")


@pytest.mark.parametrize(("name", "tied"), [("t5", True), ("t5-gated", False), ("mt5", False)])
def test_the_older_dialect_means_the_same(name, tied, fixture_model, expected_of):
    expected = expected_of(name)
    directory = rewrite(
        fixture_model(name), NEWER, tie_word_embeddings=tied, n_positions=512, output_past=True, torch_dtype="float32"
    )
    assert np.abs(logits(directory, expected) - expected["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_logits_are_scaled_where_embeddings_are_said_to_be_tied(name, fixture_model, expected_of):
    expected = expected_of(name)
    directory = rewrite(fixture_model(name), NEWER, tie_word_embeddings=False)
    dim = load_model(directory).config.dim
    assert np.abs(logits(directory, expected) * dim**-0.5 - expected["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", ["t5", "umt5"])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_newer_key_of_the_scale_comes_before_the_older(name, scaled):
    values = {"model_type": name, "scale_decoder_outputs": scaled, "tie_word_embeddings": not scaled}
    config = family(name).read_config(values)
    assert config.head.scale == (512**-0.5 if scaled else 1.0)
    assert family(name).unparse(config)["scale_decoder_outputs"] is scaled


def test_what_is_stored_decides_whether_the_head_is_tied(fixture_model):
    assert load_model(rewrite(fixture_model("mt5"), tie_word_embeddings=True)).config.untied
    assert not load_model(rewrite(fixture_model("t5"), tie_word_embeddings=False)).config.untied


def test_copies_of_the_table_may_stand_for_it(fixture_model, expected_of):
    directory, expected = fixture_model("t5"), expected_of("t5")
    tensors = {name: mx.array(np.array(x)) for name, x in mx.load(str(directory / "model.safetensors")).items()}
    table = tensors.pop("shared.weight")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors |= {"encoder.embed_tokens.weight": table, "decoder.embed_tokens.weight": table, unused: mx.zeros((8, 3))}
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "pt"})
    assert np.abs(logits(directory, expected) - expected["logits"]).max() < 1e-4


@pytest.mark.parametrize(
    ("value", "gated", "activation"),
    [
        ("relu", False, "relu"),
        ("gelu", False, "gelu"),
        ("gated-gelu", True, "gelu_tanh"),
        ("gated-silu", True, "silu"),
        ("gated-relu", True, "relu"),
    ],
)
def test_feed_forward_layers_by_name(value, gated, activation):
    config = family("t5").read_config({"model_type": "t5", "feed_forward_proj": value})
    layer = config.decoder.layers[0].feed_forward
    assert (layer.gated, layer.activation) == (gated, activation)
    again = family("t5").unparse(config)
    assert again["feed_forward_proj"] == value


@pytest.mark.parametrize("value", ["half-gelu", "gated-gelu-new"])
def test_other_feed_forward_layers_are_refused(value):
    with pytest.raises(UnsupportedModelError, match="neither NAME nor gated-NAME"):
        family("t5").read_config({"model_type": "t5", "feed_forward_proj": value})
    with pytest.raises(UnsupportedModelError, match="activation feed_forward_proj = 'gelly'"):
        family("t5").read_config({"model_type": "t5", "feed_forward_proj": "gelly"})


# The defaults of the config classes of transformers 5.23.
DEFAULTS = {
    "t5": (32128, 512, 64, 2048, 6, 8, "relu", False),
    "mt5": (250112, 512, 64, 1024, 8, 6, "gelu_tanh", True),
    "umt5": (250112, 512, 64, 1024, 8, 6, "gelu_tanh", True),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_absent_keys_mean_what_they_mean_in_transformers(name):
    config = family(name).read_config({"model_type": name})
    block = config.decoder.layers[0]
    assert DEFAULTS[name] == (
        config.embeddings.vocab_size,
        config.dim,
        block.attention.head_dim,
        block.feed_forward.hidden_dim,
        len(config.encoder.layers),
        block.attention.num_heads,
        block.feed_forward.activation,
        block.feed_forward.gated,
    )
    assert len(config.decoder.layers) == len(config.encoder.layers)
    assert config.decoder_start == 0
    assert block.attention.dropout == 0.1


def test_tables_of_positions_are_shared_or_each_layers_own():
    shared = family("t5").read_config({"model_type": "t5"})
    own = family("umt5").read_config({"model_type": "umt5"})
    for stack, both in (("encoder", True), ("decoder", False)):
        buckets = getattr(shared, stack).positions
        assert buckets == RelativeBucketsSpec(num_heads=8, bidirectional=both)
        assert {layer.attention.positions for layer in getattr(shared, stack).layers} == {NoPositionsSpec()}
        assert getattr(own, stack).positions is None
        assert {layer.attention.positions.bidirectional for layer in getattr(own, stack).layers} == {both}
    assert own.decoder.layers[0].cross_attention.positions == NoPositionsSpec()


def test_every_layer_moves_the_gradient_of_a_shared_table(fixture_model, expected_of):
    model = load_model(fixture_model("t5"))
    expected = expected_of("t5")
    tokens, decoder = mx.array(expected["tokens"][:1]), mx.array(expected["decoder_tokens"][:1])

    def loss(weight, step=0.0):
        model.decoder.positions.weight = weight + step
        return model(tokens, decoder_tokens=decoder).square().mean()

    weight = model.decoder.positions.weight
    slope = mx.grad(loss)(weight)
    draw = mx.random.normal(weight.shape, key=mx.random.key(0))
    difference = (loss(weight, 1e-2 * draw) - loss(weight, -1e-2 * draw)).item() / 2e-2
    assert (slope * draw).sum().item() == pytest.approx(difference, rel=1e-2)


def test_unknown_keys_are_refused():
    with pytest.raises(ConfigError, match="relative_attention_bukets"):
        family("t5").read_config({"model_type": "t5", "relative_attention_bukets": 3})
    with pytest.raises(UnsupportedModelError, match="is_decoder"):
        family("t5").parse(HubConfig({"model_type": "t5", "is_decoder": True}))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_encoders_states_are_embeddings(tiny_seq2seq, pooling):
    model, tokenizer = tiny_seq2seq
    texts = ["a text", "another one, longer"]
    vectors = mlxlm.embed(model, tokenizer, texts, pooling=pooling, normalize=False)
    for text, vector in zip(texts, vectors, strict=True):
        states = np.array(model.encode(mx.array([tokenizer.encode(text)])))[0]
        one = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        assert np.abs(vector - one).max() < 1e-4
