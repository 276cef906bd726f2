"""Embeddings: pooling by its definition, whatever the batch and the order."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

import mlxlm
from mlxlm.errors import PromptError, UnsupportedModelError, UsageError

TEXTS = ["the", "the thing is.", "a", "is the thing the thing is", "b c d e f g h"]


def alone(model, tokenizer, text, pooling):
    hidden = np.array(model.hidden(mx.array([tokenizer.encode(text)])), dtype=np.float64)[0]
    return {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_text_has_the_embedding_it_has_alone(tiny_bert, pooling, batch_size):
    vectors = mlxlm.embed(*tiny_bert, TEXTS, pooling=pooling, batch_size=batch_size, normalize=False)
    assert vectors.shape == (len(TEXTS), 30)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert np.abs(vector - alone(*tiny_bert, text, pooling)).max() < 1e-5


def test_normalised_vectors_have_length_one(tiny_bert):
    assert np.allclose(np.linalg.norm(mlxlm.embed(*tiny_bert, TEXTS), axis=1), 1, atol=1e-6)


def test_the_checkpoint_says_how_to_pool(tiny_bert_directory):
    (tiny_bert_directory / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tiny_bert_directory / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    model, tokenizer = mlxlm.load(tiny_bert_directory)
    assert (mlxlm.embed(model, tokenizer, TEXTS) == mlxlm.embed(model, tokenizer, TEXTS, pooling="cls")).all()


def test_decoders_embed_too(tiny):
    vectors = mlxlm.embed(*tiny, ["ab", "abc"], pooling="last", normalize=False)
    assert np.abs(vectors[0] - alone(*tiny, "ab", "last")).max() < 1e-5


def test_a_text_that_is_too_long_is_named_or_cut(tiny_bert):
    texts = ["a", "the " * 60]
    with pytest.raises(PromptError, match="text 2 has 62 tokens, but the model's context is 48"):
        mlxlm.embed(*tiny_bert, texts)
    vector = mlxlm.embed(*tiny_bert, texts, truncate=True, normalize=False)[1]
    assert np.abs(vector - alone(*tiny_bert, "the " * 46, "mean")).max() < 1e-5


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (["a", ""], {}, "text 2 is empty"),
        ("a", {}, "one string"),
        (["a"], {"pooling": "maen"}, "did you mean 'mean'"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
    ],
    ids=["empty", "string", "pooling", "batch"],
)
def test_bad_input_is_named(tiny_bert, texts, options, words):
    with pytest.raises((PromptError, UsageError), match=words):
        mlxlm.embed(*tiny_bert, texts, **options)


def test_modules_that_are_not_implemented_are_refused(tiny_bert_directory):
    modules = [{"type": f"sentence_transformers.models.{name}", "path": ""} for name in ("Transformer", "Dense")]
    (tiny_bert_directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError, match="Dense"):
        mlxlm.embed(*mlxlm.load(tiny_bert_directory), ["a"])


def test_a_checkpoint_may_allow_fewer_tokens_than_its_context(tiny_bert_directory):
    (tiny_bert_directory / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    with pytest.raises(PromptError, match="text 1 has 11 tokens, but the model's context is 8"):
        mlxlm.embed(*mlxlm.load(tiny_bert_directory), ["a b c d e f g h i"])
