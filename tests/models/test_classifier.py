"""A pretrained body with a new classification head."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlm.errors import UnsupportedModelError, UsageError
from mlxlm.models import Transformer, load_model, save, with_classification_head

LABELS = ["bad", "good", "fine"]
BODIES = ["bert", "bert-pooled", "bert-pretraining", "roberta", "roberta-pooled", "modernbert", "modernbert-headless"]
BODIES += ["llama", "llama-headless", "llama-tied", "gpt2", "gpt2-headless", "qwen3", "bert-tokens"]
TOKENS = mx.array([[5, 9, 13, 7], [8, 21, 3, 3]])


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("kind", ["sequence", "tokens"])
def test_the_body_stays_and_the_head_is_new(name, kind, fixture_model, tmp_path):
    model = load_model(fixture_model(name))
    classifier = with_classification_head(model, kind, LABELS)
    assert mx.abs(classifier.hidden(TOKENS) - model.hidden(TOKENS)).max().item() < 1e-5
    lengths = mx.array([4, 2])
    logits = classifier(TOKENS, key_lengths=lengths)
    assert logits.shape == ((2, 3) if kind == "sequence" else (2, 4, 3))
    assert classifier.config.head.labels == tuple(LABELS)
    save(classifier, None, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.config == classifier.config
    assert mx.abs(again(TOKENS, key_lengths=lengths) - logits).max().item() < 1e-5


def test_what_a_checkpoint_holds_of_the_head_is_kept(fixture_model):
    model = load_model(fixture_model("bert-pooled"))
    classifier = with_classification_head(model, "sequence", LABELS)
    assert mx.array_equal(classifier.head.transform.linear.weight, model.pooler.linear.weight)


def test_spans_have_no_labels(fixture_model):
    classifier = with_classification_head(load_model(fixture_model("roberta")), "span")
    assert classifier(TOKENS).shape == (2, 4, 2)


def test_dtype_is_the_bodys(fixture_model):
    classifier = with_classification_head(load_model(fixture_model("bert"), dtype="bfloat16"), "sequence", LABELS)
    assert {array.dtype for _, array in tree_flatten(classifier.parameters())} == {mx.bfloat16}


def test_gradients_reach_head_and_body(fixture_model):
    classifier = with_classification_head(load_model(fixture_model("llama")), "sequence", LABELS)

    def loss(parameters):
        classifier.update(parameters)
        return classifier(TOKENS).square().sum()

    slopes = dict(tree_flatten(mx.grad(loss)(classifier.trainable_parameters())))
    for name in ("head.output.weight", "decoder.layers.0.attention.query.weight", "embeddings.token.weight"):
        assert np.abs(np.array(slopes[name])).max() > 0


def test_mistakes_are_refused(fixture_model):
    model = load_model(fixture_model("llama"))
    with pytest.raises(UsageError, match="did you mean 'tokens'"):
        with_classification_head(model, "token", LABELS)
    with pytest.raises(UsageError, match="different names"):
        with_classification_head(model, "sequence", ["a", "a"])
    with pytest.raises(UsageError, match="none for spans"):
        with_classification_head(model, "span", LABELS)
    with pytest.raises(UsageError, match="different names"):
        with_classification_head(model, "sequence")
    with pytest.raises(UsageError, match="not loaded from a checkpoint"):
        with_classification_head(Transformer(model.config), "sequence", LABELS)
    with pytest.raises(UnsupportedModelError, match="Phi3ForQuestionAnswering"):
        with_classification_head(load_model(fixture_model("phi3")), "span")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bloom"])
def test_a_decoder_takes_a_head_over_spans(name, fixture_model, tmp_path):
    model = load_model(fixture_model(name))
    tokens = mx.array([[5, 6, 7]])
    spans = with_classification_head(model, "span")
    assert spans(tokens).shape == (1, 3, 2)
    assert mx.array_equal(spans.hidden(tokens), model.hidden(tokens))
    save(spans, None, tmp_path / "spans")
    assert mx.array_equal(load_model(tmp_path / "spans")(tokens), spans(tokens))


@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5", "umt5"])
@pytest.mark.parametrize("kind", ["sequence", "tokens", "span"])
def test_an_encoder_decoder_takes_every_head(name, kind, fixture_model, tmp_path):
    model = load_model(fixture_model(name))
    classifier = with_classification_head(model, kind, () if kind == "span" else LABELS)
    lengths = mx.array([4, 2])
    logits = classifier(TOKENS, key_lengths=lengths)
    assert logits.shape == {"sequence": (2, 3), "tokens": (2, 4, 3), "span": (2, 4, 2)}[kind]
    assert mx.abs(classifier.encode(TOKENS) - model.encode(TOKENS)).max().item() < 1e-5
    save(classifier, None, tmp_path / "saved")
    assert mx.abs(load_model(tmp_path / "saved")(TOKENS, key_lengths=lengths) - logits).max().item() < 1e-5


def test_a_decoder_under_a_head_over_labels_reads_the_encoders_tokens_again(fixture_model):
    model = load_model(fixture_model("t5-sequence"))
    shifted = mx.concatenate([mx.zeros((2, 1), mx.int32), TOKENS[:, :-1]], axis=1)
    assert mx.array_equal(model(TOKENS), model(TOKENS, decoder_tokens=shifted))
    assert model.hidden(TOKENS).shape == (*TOKENS.shape, model.config.dim)
    with pytest.raises(UsageError, match=r"decoder_tokens have shape \(2, 1\); a head over labels needs \(2, 4\)"):
        model(TOKENS, decoder_tokens=shifted[:, :1])
    with pytest.raises(UsageError, match="needs decoder_tokens"):
        load_model(fixture_model("t5"))(TOKENS)
