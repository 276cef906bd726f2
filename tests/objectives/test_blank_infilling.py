"""Blank infilling: spans, blanks, the two coordinates, and loss on what fills the blanks alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mlxlm.data.batch import IGNORE
from mlxlm.errors import TokenizerError, UsageError
from mlxlm.objectives import BlankInfilling
from mlxlm.objectives.spans import place_spans, poisson_weights

MASK, SENTENCE, GENERATION, START, END, CLS, EOS, BLOCKED = range(1, 9)
ENDS = np.arange(1000) % 20 == 0
IDS = {"mask_id": MASK, "sentence_id": SENTENCE, "generation_id": GENERATION, "start_id": START, "end_id": END}
OBJECTIVE = BlankInfilling(**IDS, ends=ENDS, cls_id=CLS, eos_id=EOS)
BLANK = {"token": MASK, "sentence": SENTENCE, "generation": GENERATION}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def text(rng, size):
    return rng.integers(10, 1000, size).astype(np.int32)


def fillings(one):
    """Position of the blank -> tokens that fill it, in the order of Part B, from inputs and targets."""
    found, current = {}, None
    for token, target, position, block in zip(*(a[one.prefix :].tolist() for a in one[:4]), strict=True):
        if block == 1:
            assert token == START
            assert position not in found
            current = found.setdefault(position, [])
        else:
            assert token == current[-1]
            assert found[position] is current
        assert block == len(current) + 1
        if target != END:
            current.append(target)
    return found


@pytest.mark.parametrize("mode", BLANK)
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 50, 400])
def test_the_text_is_rebuilt(mode, size, rng):
    for _ in range(20):
        raw = text(rng, size)
        one = OBJECTIVE.corrupt(raw, mode, rng, 512)
        part, found = one.tokens[: one.prefix].tolist(), fillings(one)
        assert [place for place, token in enumerate(part) if token in BLANK.values()] == sorted(found)
        assert {part[place] for place in found} == {BLANK[mode]}
        whole = [word for place, token in enumerate(part) for word in found.get(place, [token])]
        assert whole == [CLS, *raw.tolist(), EOS]
        assert one.positions[: one.prefix].tolist() == list(range(one.prefix))
        assert not one.blocks[: one.prefix].any()
        assert (one.targets[: one.prefix] == IGNORE).all()
        assert (one.targets[one.prefix :] != IGNORE).all()
        assert len(one.tokens) <= 512


def test_token_spans_are_truncated_poisson_and_reach_the_ratio(rng):
    expected = np.array([math.exp(-3) * 3**k / math.factorial(k) for k in range(1, 40)])
    assert poisson_weights(3.0, 39) == pytest.approx(expected / expected.sum(), rel=1e-9)
    drawn = []
    for _ in range(300):
        spans = OBJECTIVE.span_lengths(400, 100, rng)
        assert sum(spans) >= 60 > sum(spans[:-1])
        drawn += spans[:-1]  # the last one is longer than usual, because it crosses the line
    assert np.mean(drawn) == pytest.approx(3.157, abs=0.1)
    assert min(drawn) == 1
    assert max(drawn) <= 39


def test_spans_have_a_token_between_and_reach_both_ends(rng):
    firsts, lasts = set(), set()
    for _ in range(300):
        spans = place_spans([2, 3, 1], 12, rng)
        assert [stop - start for start, stop in spans] == [2, 3, 1]
        assert all(after[0] > before[1] for before, after in itertools.pairwise(spans))
        firsts.add(spans[0][0])
        lasts.add(spans[-1][1])
    assert min(firsts) == 0
    assert max(lasts) == 12
    with pytest.raises(UsageError, match="don't fit"):
        place_spans([2, 2], 4, rng)


def test_sentences_are_whole(rng):
    for _ in range(50):
        raw = text(rng, 200)
        spans = OBJECTIVE.sentences(raw, 100, rng)
        edges = {0, 200, *(np.flatnonzero(ENDS[raw]) + 1).tolist()}
        assert all(start in edges and stop in edges for start, stop in spans)
        assert sum(stop - start for start, stop in spans) >= 30
        assert all(not ENDS[raw[start : stop - 1]].any() for start, stop in spans)


def test_generation_cuts_the_end_off_from_a_quarter_to_all(rng):
    shares = []
    for _ in range(800):
        one = OBJECTIVE.corrupt(text(rng, 100), "generation", rng, 512)
        shares.append(len(one.tokens) - one.prefix - 1)
    assert min(shares) == 25
    assert max(shares) == 100
    assert np.mean(shares) == pytest.approx(62.5, abs=2.5)


def test_spans_are_shuffled(rng):
    orders = set()
    for _ in range(50):
        found = list(fillings(OBJECTIVE.corrupt(text(rng, 60), "token", rng, 512)))
        orders.add(found == sorted(found))
    assert orders == {True, False}


def test_modes_are_mixed_as_asked(rng):
    rows = [[text(rng, 40)] for _ in range(1000)]
    batch = OBJECTIVE.batch(rows, rng, 128)
    shares = [np.mean((batch["tokens"] == blank).any(1)) for blank in BLANK.values()]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.05)


def test_batches_have_what_the_model_takes(rng):
    length = OBJECTIVE.row_length(512)
    batch = OBJECTIVE.batch([[text(rng, length)], [text(rng, 5)]], rng, 512)
    assert set(batch) == {"tokens", "targets", "positions", "blocks", "prefix_lengths"}
    assert length > 430
    assert batch["tokens"].shape[1] <= 512
    assert all(batch[name].shape == batch["tokens"].shape for name in ("targets", "positions", "blocks"))
    for row, prefix in enumerate(batch["prefix_lengths"]):
        assert (batch["targets"][row, :prefix] == IGNORE).all()
        assert batch["targets"][row, prefix] != IGNORE


def test_hidden_inputs_of_the_filling(rng):
    objective = BlankInfilling(**IDS, ends=ENDS, blocked_id=BLOCKED, block_rate=0.1)
    hidden, total = 0, 0
    for _ in range(200):
        one = objective.corrupt(text(rng, 400), "token", rng, 512)
        places = one.tokens == BLOCKED
        assert (one.blocks[places] > 1).all()
        assert not (one.targets == BLOCKED).any()
        hidden, total = hidden + places.sum(), total + (one.blocks > 1).sum()
    assert hidden / total == pytest.approx(0.1, abs=0.01)
    with pytest.raises(UsageError, match="block_rate"):
        BlankInfilling(**IDS, ends=ENDS, block_rate=0.1)


def test_the_same_state_gives_the_same_batch(rng):
    rows = [[text(rng, 100)] for _ in range(4)]
    one, two = (OBJECTIVE.batch(rows, np.random.default_rng(3), 128) for _ in range(2))
    assert all((one[name] == two[name]).all() for name in one)


def test_it_fits_the_model(tiny_blank_directory, rng):
    """The keys are those of the model; a change of a token in Part B reaches no earlier logits, one in Part A all."""
    import mlx.core as mx

    import mlxlm

    model, tokenizer = mlxlm.load(tiny_blank_directory)
    objective = BlankInfilling.from_tokenizer(tokenizer, rates=(1.0, 0.0, 0.0))
    words = [id for id in range(tokenizer.vocab_size) if id not in tokenizer.special_ids]
    batch = objective.batch([[np.array(words[:12])]], rng, 24)
    batch = {name: mx.array(array) for name, array in batch.items() if name != "targets"}
    prefix = int(batch["prefix_lengths"][0].item())
    before = np.array(model(**batch))
    assert np.isfinite(before).all()
    last = dict(batch, tokens=mx.array(batch["tokens"]))
    last["tokens"][0, prefix + 1] = words[20]
    after = np.array(model(**last))
    assert np.abs(after - before)[0, : prefix + 1].max() < 1e-6 < np.abs(after - before)[0, prefix + 1].max()


def test_a_tokenizer_without_the_tokens_is_refused():
    with pytest.raises(TokenizerError, match=r"\[MASK\]"):
        BlankInfilling.from_tokenizer(type("T", (), {"token_id": lambda self, name: None})())
    with pytest.raises(UsageError, match="sum to 1"):
        BlankInfilling(**IDS, ends=ENDS, rates=(0.5, 0.5, 0.5))
