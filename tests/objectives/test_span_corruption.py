"""Span corruption: exact lengths, noise, sentinels, and the text rebuilt from input and target."""

from __future__ import annotations

import numpy as np
import pytest

from mlxlm.data.batch import IGNORE
from mlxlm.errors import TokenizerError, UsageError
from mlxlm.objectives import SpanCorruption, TextToText, mixing_rates
from mlxlm.objectives.span_corruption import find_sentinels
from mlxlm.objectives.spans import noise_mask, random_parts, raw_length, spans_of

SENTINELS = tuple(range(32099, 31999, -1))
OBJECTIVE = SpanCorruption(sentinels=SENTINELS, eos_id=1, pad_id=0, start_id=0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def rebuilt(source, target):
    """The original text: each sentinel of the input replaced by what follows it in the target, and the other way."""
    answers, current = {}, None
    for token in target:
        if token in SENTINELS:
            current = answers.setdefault(token, [])
        elif current is not None:
            current.append(token)
    return [word for token in source for word in answers.get(token, [token])]


@pytest.mark.parametrize(("length", "raw", "target"), [(512, 568, 114), (128, 141, 29), (114, 126, 26)])
def test_lengths(length, raw, target, rng):
    assert raw_length(length, 0.15, 3.0) == (raw, target)
    assert OBJECTIVE.row_length(length) == raw
    assert OBJECTIVE.target_length(length) == target
    batch = OBJECTIVE.batch([[rng.integers(10, 1000, raw)]], rng, length)
    assert batch["tokens"].shape == (1, length)
    assert batch["key_lengths"].tolist() == [length]
    assert batch["targets"].shape == (1, target)
    assert (batch["targets"] != IGNORE).all()


def test_counts_and_spans_of_noise_are_exact_and_begin_after_a_token(rng):
    for _ in range(100):
        mask = noise_mask(568, 0.15, 3.0, rng)
        assert mask.sum() == 85
        assert len(spans_of(mask)) == 28
        assert not mask[0]
        assert mask[-1]


@pytest.mark.parametrize(("length", "expected"), [(1, 0), (2, 1), (3, 1)])
def test_noise_of_tiny_texts(length, expected, rng):
    assert noise_mask(length, 0.15, 3.0, rng).sum() == expected


def test_much_noise_in_short_spans_still_has_tokens_between(rng):
    mask = noise_mask(20, 0.9, 1.0, rng)
    assert mask.sum() == 18
    assert len(spans_of(mask)) == 2


def test_all_ways_to_cut_are_equally_likely(rng):
    cuts = [tuple(random_parts(5, 3, rng)) for _ in range(6000)]
    kinds, counts = np.unique(cuts, axis=0, return_counts=True)
    assert len(kinds) == 6
    assert counts.min() > 850


def test_text_is_rebuilt_and_sentinels_are_used_in_order(rng):
    texts = [rng.integers(10, 1000, size) for size in (568, 100, 2, 3)]
    rows = [[texts[0][:300], texts[0][300:]], *([text] for text in texts[1:])]
    batch = OBJECTIVE.batch(rows, rng, 512)
    for index, text in enumerate(texts):
        source = batch["tokens"][index, : batch["key_lengths"][index]]
        target = batch["targets"][index][batch["targets"][index] != IGNORE]
        assert source[-1] == 1
        assert target[-1] == 1
        assert rebuilt(source[:-1], target[:-1]) == text.tolist()
        used = [token for token in source.tolist() if token in SENTINELS]
        assert used == list(SENTINELS[: len(used)])
        assert target[0] == SENTINELS[0]
        assert source[0] == text[0], "the input starts with a token that stays"
        assert batch["decoder_tokens"][index, 0] == 0
        assert batch["decoder_tokens"][index, 1 : len(target)].tolist() == target[:-1].tolist()


def test_one_token_hides_nothing(rng):
    batch = OBJECTIVE.batch([[np.array([7])]], rng, 16)
    assert (batch["targets"] == IGNORE).all()
    assert batch["tokens"][0, :2].tolist() == [7, 1]


def test_ends_of_documents_are_left_out(rng):
    batch = OBJECTIVE.batch([[np.array([7, 8, 1]), np.array([9, 10, 1])]], rng, 16)
    target = batch["targets"][batch["targets"] != IGNORE]
    assert rebuilt(batch["tokens"][0, : batch["key_lengths"][0] - 1], target[:-1]) == [7, 8, 9, 10]
    assert (batch["tokens"] == 1).sum() == 1


def test_too_few_sentinels_are_said(rng):
    objective = SpanCorruption(sentinels=SENTINELS[:5], eos_id=1)
    with pytest.raises(UsageError, match="28 spans but the tokenizer only 5"):
        objective.batch([[np.arange(2, 570)]], rng, 512)


def test_sentinels_are_the_top_of_the_vocabulary():
    class Vocabulary:
        vocab_size = 110

        def token_id(self, name):
            number = int(name.removeprefix("<extra_id_").rstrip(">"))
            return 109 - number if number < 100 else None

    assert find_sentinels(Vocabulary()) == tuple(110 - 1 - i for i in range(100))
    with pytest.raises(TokenizerError, match="no sentinels"):
        find_sentinels(type("T", (), {"vocab_size": 3, "token_id": lambda self, name: None})())


def test_text_to_text(rng):
    objective = TextToText(eos_id=1, max_target_length=4)
    rows = [[np.array([5, 6]), np.array([7])], [np.arange(10, 20), np.array([8, 9, 10, 11, 12, 1])]]
    batch = objective.batch(rows, rng, 8)
    assert batch["tokens"].tolist() == [[5, 6, 1, 0, 0, 0, 0, 0], [10, 11, 12, 13, 14, 15, 16, 1]]
    assert batch["targets"].tolist() == [[7, 1, IGNORE, IGNORE], [8, 9, 10, 1]]
    assert batch["decoder_tokens"].tolist() == [[0, 7, 0, 0], [0, 8, 9, 10]]
    with pytest.raises(UsageError, match="not 1 pieces"):
        objective.batch([[np.array([5])]], rng, 8)


def test_mixing():
    assert mixing_rates([100, 300], limit=200).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert mixing_rates([1, 10**6], temperature=1e9).tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
