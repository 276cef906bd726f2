"""Masked language modelling: rates, what is never touched, whole words, pairs."""

from __future__ import annotations

import numpy as np
import pytest

from mlxlm.data.batch import IGNORE
from mlxlm.errors import TokenizerError, UsageError
from mlxlm.objectives import MaskedLM
from mlxlm.objectives.words import sentence_ends, word_starts

PAD, CLS, SEP, MASK = 0, 1, 2, 3
WORDS = np.arange(10, 1000, dtype=np.int32)
OBJECTIVE = MaskedLM(mask_id=MASK, cls_id=CLS, sep_id=SEP, pad_id=PAD, words=WORDS)


class Vocabulary:
    """A tokenizer as far as its spelling goes."""

    def __init__(self, names, special=()):
        self.names, self.vocab_size, self.special_ids = names, len(names), frozenset(special)

    def token(self, number):
        if self.names[number] is None:
            raise TokenizerError("unused")
        return self.names[number]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def text(rng, size):
    return rng.integers(10, 1000, size).astype(np.int32)


def rebuilt(batch):
    """The original rows: the input with every target put back."""
    return np.where(batch["targets"] == IGNORE, batch["tokens"], batch["targets"])


def test_rates_and_frame(rng):
    rows = [[text(rng, 510)] for _ in range(200)]
    batch = OBJECTIVE.batch(rows, rng, 512)
    chosen = batch["targets"] != IGNORE
    assert (chosen.sum(1) == round(0.15 * 510)).all()
    old, new = batch["targets"][chosen], batch["tokens"][chosen]
    assert np.mean(new == MASK) == pytest.approx(0.8, abs=0.012)
    assert np.mean(new == old) == pytest.approx(0.1, abs=0.01)
    assert np.isin(new[new != MASK], WORDS).all()
    assert rebuilt(batch)[:, 1:-1].tolist() == [row[0].tolist() for row in rows]
    assert set(batch["tokens"][:, 0]) == {CLS}
    assert set(batch["tokens"][:, -1]) == {SEP}


def test_special_tokens_are_never_chosen(rng):
    row = np.concatenate([[5, 6, 7], text(rng, 4), [SEP]])
    for _ in range(200):
        batch = OBJECTIVE.batch([[row]], rng, 64)
        assert (batch["targets"] != IGNORE).sum() == 1
        assert batch["targets"][0, :4].tolist() == [IGNORE] * 4
        assert batch["key_lengths"].tolist() == [9]  # the end of the document is not framed twice
        assert (batch["targets"][0, 8:] == IGNORE).all()
        assert (batch["tokens"][0, 9:] == PAD).all()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("pairs", [False, True])
def test_tiny_texts_still_predict_one_token(size, pairs, rng):
    objective = MaskedLM(mask_id=MASK, cls_id=CLS, sep_id=SEP, words=WORDS, next_sentence=pairs)
    assert (objective.batch([[text(rng, size)]], rng, 16)["targets"] != IGNORE).sum() == 1


def test_a_text_of_special_tokens_predicts_nothing(rng):
    assert (OBJECTIVE.batch([[np.array([5, 6])]], rng, 16)["targets"] == IGNORE).all()


def test_whole_words_are_masked_whole(rng):
    starts = np.arange(1000) % 4 != 3  # every fourth id goes on with a word
    objective = MaskedLM(mask_id=MASK, cls_id=CLS, sep_id=SEP, words=WORDS, starts=starts, masked=1.0, replaced=0.0)
    counts = []
    for _ in range(100):
        row = text(rng, 100)
        batch = objective.batch([[row]], rng, 102)
        chosen = (batch["targets"] != IGNORE)[0, 1:-1]
        begins = starts[row] | (np.arange(100) == 0)
        word = np.cumsum(begins)
        assert all(len(set(chosen[word == number])) == 1 for number in np.unique(word))
        counts.append(chosen.sum())
    assert max(counts) == 15
    assert np.mean(counts) > 14.5


def test_a_word_longer_than_the_budget_is_masked_in_part(rng):
    starts = np.zeros(1000, dtype=bool)
    objective = MaskedLM(mask_id=MASK, cls_id=CLS, sep_id=SEP, words=WORDS, starts=starts)
    assert (objective.batch([[text(rng, 20)]], rng, 32)["targets"] != IGNORE).sum() == 3


def test_pairs(rng):
    objective = MaskedLM(mask_id=MASK, cls_id=CLS, sep_id=SEP, words=WORDS, next_sentence=True)
    rows = [[np.arange(100 * n + 10, 100 * n + 39, dtype=np.int32)] for n in range(8)]
    labels = []
    for _ in range(100):
        batch = objective.batch(rows, rng, 32)
        whole = rebuilt(batch)
        for index, row in enumerate(whole):
            first, second = row[1:].tolist().index(SEP) + 1, 31
            assert row[second] == SEP
            assert batch["token_types"][index].tolist() == [0] * (first + 1) + [1] * (31 - first)
            assert row[1:first].tolist() == rows[index][0][: first - 1].tolist()
            same = set(row[first + 1 : second] // 100) == {index}
            assert batch["next_sentence_labels"][index] == (not same)
            if same:
                assert row[first + 1 : second].tolist() == rows[index][0][first - 1 :].tolist()
        labels += batch["next_sentence_labels"].tolist()
    assert np.mean(labels) == pytest.approx(0.5, abs=0.06)


def test_the_same_state_gives_the_same_batch(rng):
    rows = [[text(rng, 50)]]
    one, two = (OBJECTIVE.batch(rows, np.random.default_rng(4), 64) for _ in range(2))
    other = OBJECTIVE.batch(rows, np.random.default_rng(5), 64)
    assert all((one[key] == two[key]).all() for key in one)
    assert (one["targets"] != other["targets"]).any()


def test_settings_are_checked():
    with pytest.raises(UsageError, match=r"rate 1\.5"):
        MaskedLM(mask_id=MASK, cls_id=CLS, sep_id=SEP, words=WORDS, rate=1.5)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["[CLS]", "play", "##ing", "##", "."], [True, True, False, True, True]),
        (["<s>", "Ġplay", "ing", "Ċ", "x"], [True, True, False, True, False]),
        (["<s>", "▁play", "ing", "▁", None], [True, True, False, True, False]),
    ],
    ids=["wordpiece", "byte-level", "sentencepiece"],
)
def test_where_words_begin(names, expected):
    starts = word_starts(Vocabulary(names, special=[0]))
    if names[1] == "play":
        expected[3] = False  # "##" alone can only be a piece that goes on
    assert starts.tolist() == expected


def test_a_vocabulary_without_words_is_refused():
    with pytest.raises(TokenizerError, match="marks no words"):
        word_starts(Vocabulary(["a", "b"]))


def test_where_sentences_end():
    assert sentence_ends(Vocabulary(["a", ".", "b?", "Ċ", ".a", "。"])).tolist() == [0, 1, 1, 1, 0, 1]


def test_from_a_tokenizer(tiny_bert):
    _, tokenizer = tiny_bert
    objective = MaskedLM.from_tokenizer(tokenizer, whole_words=True)
    assert (objective.mask_id, objective.cls_id, objective.sep_id) == (4, 2, 3)
    assert not set(objective.words.tolist()) & tokenizer.special_ids
    assert not objective.starts[tokenizer.token_id("##a")]
    assert objective.starts[tokenizer.token_id("the")]
    with pytest.raises(TokenizerError, match="mask"):
        MaskedLM.from_tokenizer(type("T", (), {"mask_id": None, "cls_id": 1, "sep_id": 2})())
