"""Labels of texts and words, and the scores of labels, against counting by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import DataError, PromptError, UnsupportedModelError, UsageError
from mlxlm.generation import classify, entities, score_labels, tag
from mlxlm.models import with_classification_head

TEXTS = ["the abc is", "a", "zzz the ing is abcdef", "q q q"]


@pytest.fixture
def classifier(tiny_bert):
    model, tokenizer = tiny_bert
    mx.random.seed(0)
    return with_classification_head(model, "sequence", ["bad", "good", "fine"]), tokenizer


def test_a_text_gets_the_label_of_its_logits_whatever_it_is_batched_with(classifier):
    model, tokenizer = classifier
    together = classify(model, tokenizer, TEXTS, batch_size=3)
    for text, found in zip(TEXTS, together, strict=True):
        logits = np.array(model(mx.array([tokenizer.encode(text)]))[0], dtype=np.float64)
        chances = np.exp(logits) / np.exp(logits).sum()
        assert found.label == ["bad", "good", "fine"][logits.argmax()]
        assert [found.probabilities[name] for name in ("bad", "good", "fine")] == pytest.approx(chances, abs=1e-5)
        assert list(found.probabilities.values()) == sorted(found.probabilities.values(), reverse=True)


def test_pairs_have_token_types(classifier):
    model, tokenizer = classifier
    (found,) = classify(model, tokenizer, ["the abc"], pairs=["is ing"])
    ids, types = tokenizer.encode_with_types("the abc", "is ing")
    logits = np.array(model(mx.array([ids]), token_types=mx.array([types]))[0], dtype=np.float64)
    assert found.probability == pytest.approx(float((np.exp(logits) / np.exp(logits).sum()).max()), abs=1e-5)


def test_a_word_gets_the_label_of_its_first_token(tiny_bert):
    model, tokenizer = tiny_bert
    mx.random.seed(0)
    tagger = with_classification_head(model, "tokens", ["O", "B-X", "I-X"])
    sentences = [["the", "abc", "is"], ["zz"]]
    found = tag(tagger, tokenizer, sentences)
    for words, labels in zip(sentences, found, strict=True):
        ids = tokenizer.encode(" ".join(words))
        best = np.array(tagger(mx.array([ids]))[0]).argmax(-1)
        starts = [
            1 + sum(len(tokenizer.encode(w, add_special_tokens=False)) for w in words[:i]) for i in range(len(words))
        ]
        assert labels == [("O", "B-X", "I-X")[best[place]] for place in starts]


def test_scores_are_those_of_counting_by_hand():
    """Two of three a are right, one b of one, and c is predicted once but never right."""
    scores = score_labels(["a", "a", "a", "b"], ["a", "a", "c", "b"])
    assert scores.accuracy == 0.75
    assert scores.balanced_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert scores.macro_f1 == pytest.approx((0.8 + 1 + 0) / 3)
    assert (scores.classes["a"].precision, scores.classes["a"].support) == (1.0, 3)
    assert scores.entity_f1 is None


def test_entities_are_whole_stretches_of_one_kind():
    tags = ["B-P", "I-P", "O", "I-L", "B-L", "I-P", "S-P", "I-P"]
    assert entities(tags) == {("P", 0, 2), ("L", 3, 4), ("L", 4, 5), ("P", 5, 6), ("P", 6, 7), ("P", 7, 8)}
    scores = score_labels([["B-P", "I-P", "O"], ["B-L"]], [["B-P", "O", "O"], ["B-L"]])
    assert scores.entity_f1 == pytest.approx(2 * 1 / (2 + 2))
    assert scores.accuracy == 0.75


def test_mistakes_are_told(classifier, tiny_bert, tiny):
    model, tokenizer = classifier
    with pytest.raises(PromptError, match="text 2 is empty"):
        classify(model, tokenizer, ["a", " "])
    with pytest.raises(UsageError, match="2 texts but 1 pairs"):
        classify(model, tokenizer, ["a", "b"], pairs=["c"])
    with pytest.raises(DataError, match=r"text 1: .* tokens are more than"):
        classify(model, tokenizer, ["abc " * 200])
    assert len(classify(model, tokenizer, ["abc " * 200], truncate=True)) == 1
    for other, function in ((tiny, classify), (tiny_bert, classify), (classifier, tag)):
        with pytest.raises(UnsupportedModelError, match="mlxlm finetune"):
            function(*other, ["a"] if function is classify else [["a"]])
    with pytest.raises(UsageError, match="no labels"):
        score_labels([], [])
    assert classify(model, tokenizer, []) == []
