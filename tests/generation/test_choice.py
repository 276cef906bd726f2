"""Multiple choice: log probabilities are those of one plain pass over context and choice."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import PromptError, UnsupportedModelError, UsageError
from mlxlm.generation import likelihoods

CONTEXT = "the sky is"
CHOICES = [" blue", " a cup of tea", "."]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_a_decoder_reads_context_and_choice_as_one_text(tiny):
    model, tokenizer = tiny
    found = likelihoods(model, tokenizer, CONTEXT, CHOICES, batch_size=2)
    start = len(tokenizer.encode(CONTEXT))
    for choice, one in zip(CHOICES, found, strict=True):
        tokens = tokenizer.encode(CONTEXT + choice)
        scores = log_softmax(np.array(model(mx.array([tokens]))[0], dtype=np.float64))
        expected = sum(scores[i - 1, tokens[i]] for i in range(start, len(tokens)))
        assert one.log_probability == pytest.approx(expected, abs=1e-4)
        assert (one.text, one.num_tokens, one.score) == (choice, len(tokens) - start, one.log_probability)


def test_an_encoder_decoder_reads_the_context_first(tiny_seq2seq):
    model, tokenizer = tiny_seq2seq
    found = likelihoods(model, tokenizer, CONTEXT, CHOICES)
    source = mx.array([tokenizer.encode(CONTEXT)])
    for choice, one in zip(CHOICES, found, strict=True):
        tokens = tokenizer.encode(choice, add_special_tokens=False)
        decoder = mx.array([[model.config.decoder_start, *tokens[:-1]]])
        scores = log_softmax(np.array(model(source, decoder_tokens=decoder)[0], dtype=np.float64))
        expected = sum(scores[i, token] for i, token in enumerate(tokens))
        assert one.log_probability == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("normalize", "length"), [("none", lambda c: 1), ("tokens", len), ("bytes", len)])
def test_scores_are_divided_by_the_length(tiny, normalize, length):
    for one in likelihoods(*tiny, CONTEXT, CHOICES, normalize=normalize):
        assert one.score == pytest.approx(one.log_probability / length(one.text))


def test_bytes_are_not_characters(tiny):
    (one,) = likelihoods(*tiny, CONTEXT, ["é"], normalize="bytes")
    assert one.score == pytest.approx(one.log_probability / 2)


def test_mistakes_are_refused(tiny, tiny_bert):
    with pytest.raises(UsageError, match="did you mean 'tokens'"):
        likelihoods(*tiny, CONTEXT, CHOICES, normalize="token")
    with pytest.raises(UsageError, match="at least one"):
        likelihoods(*tiny, CONTEXT, [])
    with pytest.raises(PromptError, match="choice 2 is empty"):
        likelihoods(*tiny, CONTEXT, ["a", ""])
    with pytest.raises(PromptError, match="context is empty"):
        likelihoods(*tiny, "", CHOICES)
    with pytest.raises(PromptError, match="the model's context is 64"):
        likelihoods(*tiny, CONTEXT, ["a" * 60])
    with pytest.raises(UnsupportedModelError, match="encoder-only"):
        likelihoods(*tiny_bert, CONTEXT, CHOICES)
