"""Evaluation against NumPy: perplexity token by token, choices, exact matches; and the same at every batch size."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.data import check_rows
from mlxlm.errors import DataError, PromptError, UnsupportedModelError, UsageError
from mlxlm.generation import EvaluationSettings, evaluate_rows, generate, perplexity
from mlxlm.generation.perplexity import windows
from mlxlm.models import with_classification_head

TEXTS = ["the quick brown fox jumps over it.", "a", "Why not? Because", "é is not ascii"]


def log_softmax(logits):
    logits = np.array(logits, dtype=np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def rows_of(*values):
    return check_rows("rows", ((f"row {number}", value) for number, value in enumerate(values, 1)))


def test_windows_are_those_of_the_evaluation_harness():
    """The example in the documentation of lm_eval's `loglikelihood_rolling`, -1 for the start token."""
    found = [
        (example.tokens[:-1], [token for token, target in zip(example.tokens, example.scored, strict=True) if target])
        for example in windows([-1, *range(10)], 4, 4)
    ]
    assert found == [([-1, 0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6, 7]), ([5, 6, 7, 8], [8, 9])]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 1), (5, 2), (5, 3), (4, 4), (20, 7)])
def test_every_token_is_a_target_once_and_has_enough_before_it(count, window, stride):
    seen = []
    for example in windows(list(range(count + 1)), window, stride):
        first, targets = example.tokens[0], [t for t, s in zip(example.tokens, example.scored, strict=True) if s]
        assert len(example.tokens) <= window + 1
        assert all(token - first >= min(token, window - stride + 1) for token in targets)
        seen += targets
    assert seen == list(range(1, count + 1))


@pytest.mark.parametrize(("window", "stride"), [(None, None), (5, 2), (7, 7), (6, 1)])
@pytest.mark.parametrize("batch_size", [1, 50])
def test_perplexity_is_that_of_one_pass_a_token(window, stride, batch_size, tiny):
    model, tokenizer = tiny
    found = perplexity(model, tokenizer, TEXTS, window=window, stride=stride, batch_size=batch_size)
    total = count = 0
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text, add_special_tokens=False)]
        for place in range(1, len(ids)):
            # The window that predicts this token: the first one that reaches it.
            end = found.window
            while end < place:
                end += found.stride
            begin = max(min(end, len(ids) - 1) - found.window, 0)
            scores = log_softmax(model(mx.array([ids[begin:place]]))[0, -1])
            total, count = total - scores[ids[place]], count + 1
    assert (found.tokens, found.texts) == (count, len(TEXTS))
    assert found.bytes == sum(len(text.encode()) for text in TEXTS) == sum(map(len, TEXTS)) + 1
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / found.bytes, rel=1e-5)
    if window == 5:
        assert found.loss != pytest.approx(perplexity(model, tokenizer, TEXTS, window=5, stride=5).loss, rel=1e-4)


def test_without_a_start_token_the_first_one_of_a_text_does_not_count(tiny):
    model, tokenizer = tiny
    tokenizer.bos_id = tokenizer.eos_id = None
    found = perplexity(model, tokenizer, ["ab!"])
    ids = tokenizer.encode("ab!", add_special_tokens=False)
    scores = log_softmax(model(mx.array([ids]))[0])
    assert (found.tokens, found.bytes) == (2, 2)
    assert found.loss == pytest.approx(-(scores[0, ids[1]] + scores[1, ids[2]]) / 2, rel=1e-5)
    with pytest.raises(PromptError, match="no token"):
        perplexity(model, tokenizer, ["a"])


def test_perplexity_refuses_what_it_can_not_do(tiny, tiny_seq2seq, tiny_bert):
    with pytest.raises(UsageError, match="stride is 9"):
        perplexity(*tiny, TEXTS, window=8, stride=9)
    with pytest.raises(UsageError, match="context"):
        perplexity(*tiny, TEXTS, window=10_000)
    with pytest.raises(UsageError, match="one string"):
        perplexity(*tiny, "text")
    with pytest.raises(UsageError, match="batch_size"):
        perplexity(*tiny, TEXTS, batch_size=0)
    with pytest.raises(UnsupportedModelError, match="source and target"):
        perplexity(*tiny_seq2seq, TEXTS)
    with pytest.raises(UnsupportedModelError):
        perplexity(*tiny_bert, TEXTS)


CHOICES = [
    {"prompt": "the sky is", "choices": ["blue", "a cup of tea", "."], "answer": "."},
    {"prompt": "I am ", "choices": ["here", "not"], "answer": 1},
    {"prompt": "Why", "choices": ["?", " not", "!!"], "answer": 0},
]
JOINED = [[" blue", " a cup of tea", " ."], ["here", "not"], [" ?", " not", " !!"]]


@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_likeliest_choice_is_predicted(normalize, batch_size, tiny):
    model, tokenizer = tiny
    expected = []
    for row, joined in zip(CHOICES, JOINED, strict=True):
        scores = []
        for choice, text in zip(row["choices"], joined, strict=True):
            before, ids = len(tokenizer.encode(row["prompt"])), tokenizer.encode(row["prompt"] + text)
            table = log_softmax(model(mx.array([ids]))[0])
            total = sum(table[place - 1, ids[place]] for place in range(before, len(ids)))
            scores.append(total / {"none": 1, "tokens": len(ids) - before, "bytes": len(choice)}[normalize])
        expected.append(int(np.argmax(scores)))
    settings = EvaluationSettings(batch_size=batch_size, normalize=normalize)
    found = evaluate_rows(model, tokenizer, rows_of(*CHOICES), settings)
    assert found.predicted == [CHOICES[0]["choices"][expected[0]], *expected[1:]]  # as the rows give the answer
    hits = sum(one == answer for one, answer in zip(expected, (2, 1, 0), strict=True))
    assert found.values["accuracy"] == hits / 3
    assert found.values["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)


def test_a_preference_is_a_choice_of_two(tiny):
    pairs = [{"prompt": "the sky is", "chosen": "blue", "rejected": "a cup of tea"}]
    turned = [{"prompt": "the sky is", "chosen": "a cup of tea", "rejected": "blue"}]
    one, other = (evaluate_rows(*tiny, rows_of(*rows)).values["accuracy"] for rows in (pairs, turned))
    assert {one, other} == {0.0, 1.0}


def test_a_long_prompt_of_choices_is_an_error_or_loses_its_beginning(tiny):
    model, tokenizer = tiny
    limit = model.config.max_length
    rows = rows_of({"prompt": "a" * 90 + "bc", "choices": ["dd", "ee"], "answer": 0})
    with pytest.raises(PromptError, match=r"row 1: the text has \d+ tokens"):
        evaluate_rows(model, tokenizer, rows)
    found = evaluate_rows(model, tokenizer, rows, EvaluationSettings(truncate=True, normalize="none"))
    assert found.notes == ["2 of 2 prompts with a choice were cut on the left"]
    scores = []
    for choice in (" dd", " ee"):
        ids = tokenizer.encode("a" * 90 + "bc" + choice, add_special_tokens=False)[-limit - 1 :]
        table = log_softmax(model(mx.array([ids[:-1]]))[0])
        scores.append(sum(table[-back, ids[-back]] for back in (1, 2, 3)))
    assert found.predicted == [int(np.argmax(scores))]


def test_choices_that_mean_nothing_are_refused():
    for wrong, message in (
        ({"choices": ["a"], "answer": 0}, "at least two"),
        ({"choices": ["a", "b"], "answer": 2}, "0 to 1"),
        ({"choices": ["a", "b"], "answer": True}, "0 to 1"),
        ({"choices": ["a", "b"], "answer": "c"}, "one of the choices"),
        ({"choices": ["a", "a"], "answer": "a"}, "once"),
    ):
        with pytest.raises(DataError, match=message):
            rows_of({"prompt": "x", **wrong})


def answer_loss(model, tokens, start):
    """Sum of the losses of the tokens from `start` on."""
    table = log_softmax(model(mx.array([tokens]))[0])
    return -sum(table[place - 1, tokens[place]] for place in range(start, len(tokens)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_of_chats_are_scored_and_matched(batch_size, tiny):
    model, tokenizer = tiny
    chats = [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "cc"}],
    ]
    spoken = [generate(model, tokenizer, chat, max_tokens=6) for chat in chats]
    rows = rows_of(
        *(
            {"messages": [*chat, {"role": "assistant", "content": text}]}
            for chat, text in zip(chats, spoken, strict=True)
        ),
        {"messages": [*chats[0], {"role": "assistant", "content": "zq"}]},
    )
    found = evaluate_rows(model, tokenizer, rows, EvaluationSettings(batch_size=batch_size, max_tokens=6))
    assert found.predicted == [*spoken, spoken[0]]
    assert found.values["exact_match"] == pytest.approx(2 / 3)
    total = count = 0
    for _, row in rows.rows:
        before = tokenizer.encode_chat(row["messages"][:-1], add_generation_prompt=True)
        answer = [*tokenizer.encode(row["messages"][-1]["content"], add_special_tokens=False), tokenizer.eos_id]
        total, count = total + answer_loss(model, [*before, *answer], len(before)), count + len(answer)
    assert found.values["tokens"] == count
    assert found.values["loss"] == pytest.approx(total / count, rel=1e-5)
    alone = evaluate_rows(model, tokenizer, rows, EvaluationSettings(generate=False))
    assert "exact_match" not in alone.values
    assert alone.values["loss"] == pytest.approx(found.values["loss"], rel=1e-5)


def test_targets_of_an_encoder_decoder_are_scored_and_matched(tiny_seq2seq):
    model, tokenizer = tiny_seq2seq
    sources = ["abc", "what is this?"]
    targets = [generate(model, tokenizer, sources[0], max_tokens=5), "no"]
    rows = rows_of(*({"source": a, "target": b} for a, b in zip(sources, targets, strict=True)))
    found = evaluate_rows(model, tokenizer, rows, EvaluationSettings(max_tokens=5))
    assert found.predicted[0] == targets[0]
    assert found.values["exact_match"] in (0.5, 1.0)
    assert (found.predicted[1].strip() == "no") == (found.values["exact_match"] == 1.0)
    total = count = 0
    for source, target in zip(sources, targets, strict=True):
        ids = tokenizer.encode(target)
        decoder = mx.array([[model.config.decoder_start, *ids[:-1]]])
        table = log_softmax(model(mx.array([tokenizer.encode(source)]), decoder_tokens=decoder)[0])
        total, count = total - sum(table[place, token] for place, token in enumerate(ids)), count + len(ids)
    assert found.values["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_labels_are_counted(batch_size, tiny_bert):
    model, tokenizer = tiny_bert
    mx.random.seed(0)
    network = with_classification_head(model, "sequence", ["bad", "good"])
    texts = ["the abc", "is", "zz the q", "ing", "a b c d e f"]
    logits = [np.array(network(mx.array([tokenizer.encode(text)]))[0]) for text in texts]
    predicted = [["bad", "good"][row.argmax()] for row in logits]
    right = ["good", *predicted[1:]]
    rows = rows_of(*({"text": text, "label": label} for text, label in zip(texts, right, strict=True)))
    found = evaluate_rows(network, tokenizer, rows, EvaluationSettings(batch_size=batch_size))
    assert found.predicted == predicted
    assert found.values["accuracy"] == sum(a == b for a, b in zip(right, predicted, strict=True)) / 5
    f1 = []
    for name in {*right, *predicted}:
        hit = sum(a == b == name for a, b in zip(right, predicted, strict=True))
        f1.append(2 * hit / (right.count(name) + predicted.count(name)))
    assert found.values["macro_f1"] == pytest.approx(np.mean(f1))
    with pytest.raises(UsageError, match="did you mean 'good'"):
        evaluate_rows(network, tokenizer, rows_of({"text": "the", "label": "goood"}))


def test_tags_are_counted_by_word_and_by_entity(tiny_bert):
    model, tokenizer = tiny_bert
    mx.random.seed(3)
    network = with_classification_head(model, "tokens", ["O", "B-X", "I-X"])
    words = ["the", "abcing", "is", "q"]
    rows = rows_of({"tokens": words, "labels": ["B-X", "I-X", "O", "O"]})
    found = evaluate_rows(network, tokenizer, rows)
    (given,) = found.predicted
    hits = sum(a == b for a, b in zip(given, ["B-X", "I-X", "O", "O"], strict=True))
    assert found.values["accuracy"] == hits / 4
    assert found.values["labels"] == 4
    right = rows_of({"tokens": words, "labels": given})
    again = evaluate_rows(network, tokenizer, right)
    assert (again.values["accuracy"], again.values["macro_f1"]) == (1.0, 1.0)
    assert again.values["entity_f1"] == (1.0 if set(given) != {"O"} else 0.0)


def test_rows_for_another_kind_of_model_are_refused(tiny, tiny_bert):
    with pytest.raises(UnsupportedModelError, match="classification head"):
        evaluate_rows(*tiny, rows_of({"text": "a", "label": "b"}))
    with pytest.raises(UnsupportedModelError):
        evaluate_rows(*tiny_bert, rows_of({"prompt": "a", "completion": "b"}))
    long = rows_of({"prompt": "a" * 500, "completion": "b"})
    with pytest.raises(DataError, match="row 1"):
        evaluate_rows(*tiny, long)
    cut = evaluate_rows(*tiny, long, EvaluationSettings(truncate=True, generate=False))
    assert "1 cut" in cut.notes[0]
