"""Filling masks: probabilities by their definition."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlxlm
from mlxlm.errors import PromptError, UnsupportedModelError, UsageError


def test_scores_are_the_probabilities_of_the_words(tiny_bert):
    model, tokenizer = tiny_bert
    (candidates,) = mlxlm.fill_mask(model, tokenizer, "the [MASK] is.", top_k=4)
    tokens = tokenizer.encode("the [MASK] is.")
    logits = np.array(model(mx.array([tokens])), dtype=np.float64)[0, tokens.index(tokenizer.mask_id)]
    logits = logits[: tokenizer.vocab_size]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-probabilities)[:4]
    assert [candidate.token for candidate in candidates] == best.tolist()
    assert np.allclose([candidate.score for candidate in candidates], probabilities[best], atol=1e-6)


def test_each_of_several_masks_gets_its_words_with_the_other_left(tiny_bert):
    _, tokenizer = tiny_bert
    first, second = mlxlm.fill_mask(*tiny_bert, "[MASK] is [MASK]", top_k=1)
    assert first[0].text.endswith("is [MASK]")
    assert second[0].text.startswith("[MASK] is")
    assert tokenizer.token(first[0].token) in first[0].text.replace(" ", "") or first[0].word in first[0].text


@pytest.mark.parametrize(
    ("text", "top_k", "error", "words"),
    [
        ("no mask", 5, PromptError, r"put \[MASK\] where"),
        ("[MASK]", 0, UsageError, "top_k is 0"),
        ("[MASK] " + "a " * 60, 5, PromptError, "context is 48"),
    ],
    ids=["none", "top_k", "long"],
)
def test_bad_input_is_named(tiny_bert, text, top_k, error, words):
    with pytest.raises(error, match=words):
        mlxlm.fill_mask(*tiny_bert, text, top_k=top_k)


def test_a_decoder_can_not_fill_masks(tiny):
    with pytest.raises(UnsupportedModelError, match="mask"):
        mlxlm.fill_mask(*tiny, "a [MASK]")
