"""Readers: each token exactly once an epoch, exact positions, packing, buckets, mixtures and ranks."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from mlxlm.data import IGNORE, BatchSource, Mixture, TokenReader, TokenStore
from mlxlm.errors import DataError, UsageError


def make_store(folder, lengths, first=0):
    """Documents whose tokens are first, first + 1, ... throughout: each token of the store is different."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(lengths)
    np.arange(first, first + total, dtype=np.uint32).tofile(folder / "shard.bin")
    np.save(folder / "shard.npy", np.array([lengths, range(first, first + len(lengths))], dtype=np.uint64))
    return TokenStore.open([folder / "shard.bin"], np.dtype(np.uint32))


def drain(reader, limit=10_000):
    batches = []
    while (batch := reader.next()) is not None:
        batches.append(batch)
        assert len(batches) < limit
    return batches


def tokens_of(batches):
    return Counter(int(token) for batch in batches for token in batch["tokens"].ravel() if token >= 0)


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


LENGTHS = [3, 1, 40, 7, 16, 8, 1, 25, 2, 9, 33]


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "single"])
@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_token_is_used_once_an_epoch(tmp_path, packed_rows, single_rows, packs, shuffle, batch_size):
    store = make_store(tmp_path, LENGTHS)
    objective = packed_rows if packs else single_rows
    reader = TokenReader(store, objective, batch_size=batch_size, max_length=8, epochs=1, shuffle=shuffle)
    assert isinstance(reader, BatchSource)
    batches = drain(reader)
    assert tokens_of(batches) == Counter(range(sum(LENGTHS)))
    assert len(batches) == reader.batches_per_epoch
    assert reader.num_tokens == sum(LENGTHS)
    assert reader.epoch == 1


def test_packing_by_hand(tmp_path, packed_rows):
    reader = TokenReader(
        make_store(tmp_path, [3, 6, 1, 2]), packed_rows, batch_size=2, max_length=5, epochs=1, shuffle=False
    )
    first, last = drain(reader)
    assert first["tokens"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert first["segments"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 2]]
    assert last["tokens"].tolist() == [[10, 11, -1, -1, -1]]


def test_single_rows_by_hand(tmp_path, single_rows):
    reader = TokenReader(
        make_store(tmp_path, [3, 6, 1, 2]), single_rows, batch_size=3, max_length=4, epochs=1, shuffle=False
    )
    first, last = drain(reader)
    assert first["tokens"].tolist() == [[0, 1, 2, -1], [3, 4, 5, 6], [7, 8, -1, -1]]
    assert last["tokens"].tolist() == [[9, -1, -1, -1], [10, 11, -1, -1]]


def test_epochs_differ_and_seeds_decide(tmp_path, packed_rows):
    store = make_store(tmp_path, LENGTHS)

    def run(seed):
        return drain(TokenReader(store, packed_rows, batch_size=2, max_length=8, epochs=2, seed=seed))

    one, same, other = run(1), run(1), run(2)
    half = len(one) // 2
    assert all(equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(equal(a, b) for a, b in zip(one[:half], one[half:], strict=True))


def test_pieces_of_similar_length_share_a_batch(tmp_path, single_rows):
    lengths = np.random.default_rng(0).integers(1, 65, 512).tolist()
    store = make_store(tmp_path, lengths)
    padding = {}
    for shuffle in (True, False):
        batches = drain(TokenReader(store, single_rows, batch_size=8, max_length=64, epochs=1, shuffle=shuffle))
        padding[shuffle] = sum(
            int((batch["segments"].sum(1).max() - batch["segments"].sum(1)).sum()) for batch in batches
        )
    assert padding[True] * 10 < padding[False]


@pytest.mark.parametrize("kind", ["packed", "single", "mixture"])
def test_a_restored_reader_goes_on_exactly_from_every_position(tmp_path, packed_rows, single_rows, kind):
    store = make_store(tmp_path / "a", LENGTHS)
    data = Mixture([store, make_store(tmp_path / "b", [5, 30], 1000)], [1, 2]) if kind == "mixture" else store
    objective = single_rows if kind == "single" else packed_rows

    def reader():
        return TokenReader(data, objective, batch_size=3, max_length=8, epochs=2, seed=5)

    whole, states, batches = reader(), [], []
    while True:
        states.append((json.loads(json.dumps(whole.state())), whole.num_tokens))
        batch = whole.next()
        if batch is None:
            break
        batches.append(batch)
    assert len(batches) == 2 * whole.batches_per_epoch
    for position, (state, count) in enumerate(states):
        resumed = reader()
        resumed.restore(state)
        assert resumed.num_tokens == count
        rest = drain(resumed)
        assert len(rest) == len(batches) - position
        assert all(equal(a, b) for a, b in zip(rest, batches[position:], strict=True))


def test_states_of_other_runs_are_refused(tmp_path, packed_rows):
    store = make_store(tmp_path / "a", LENGTHS)
    state = TokenReader(store, packed_rows, batch_size=3, max_length=8).state()
    with pytest.raises(DataError, match="batch_size was 3, is 4"):
        TokenReader(store, packed_rows, batch_size=4, max_length=8).restore(state)
    other = make_store(tmp_path / "b", LENGTHS[::-1])
    with pytest.raises(DataError, match="the documents are not those"):
        TokenReader(other, packed_rows, batch_size=3, max_length=8).restore(state)
    with pytest.raises(DataError, match="not the state of a token reader"):
        TokenReader(store, packed_rows, batch_size=3, max_length=8).restore({"step": 1})


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
def test_a_mixture_keeps_its_shares_and_uses_documents_evenly(tmp_path, packed_rows, shuffle):
    large, small = make_store(tmp_path / "a", [4] * 60), make_store(tmp_path / "b", [4] * 20, 1000)
    reader = TokenReader(
        Mixture([large, small], [1, 1]), packed_rows, batch_size=8, max_length=4, epochs=3, shuffle=shuffle
    )
    batches = drain(reader)
    counts = tokens_of(batches)
    of_small = sum(count for token, count in counts.items() if token >= 1000)
    assert of_small * 2 == sum(counts.values()) == 3 * 80 * 4
    assert {counts[token] for token in range(240)} == {2}  # 120 of 3 * 80 rows, 60 rows of its own
    assert {counts[token] for token in range(1000, 1080)} == {6}
    if not shuffle:
        assert all(int((batch["tokens"] >= 1000).any(1).sum()) == 4 for batch in batches)


def test_shares_that_do_not_divide_sum_to_the_whole(tmp_path):
    store = make_store(tmp_path, [1])
    shares = Mixture([store] * 3, [1, 1, 1]).rows([4, 4, 3])
    assert shares.tolist() == [4, 4, 3]
    assert Mixture([store] * 2, [0.7, 0.3]).rows([5, 5]).tolist() == [7, 3]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "single"])
def test_ranks_read_disjoint_rows_and_have_equally_many_batches(tmp_path, packed_rows, single_rows, world, packs):
    store = make_store(tmp_path, LENGTHS)
    objective = packed_rows if packs else single_rows
    used, counts, handed_out = Counter(), set(), 0
    for rank in range(world):
        reader = TokenReader(store, objective, batch_size=2, max_length=8, epochs=1, rank=rank, world_size=world)
        batches = drain(reader)
        counts.add(len(batches))
        handed_out += reader.num_tokens
        used += tokens_of([batch for batch in batches if (batch["targets"] != IGNORE).any()])
    assert len(counts) == 1
    assert used == Counter(range(sum(LENGTHS)))
    assert handed_out == sum(LENGTHS)


def test_a_rank_without_rows_gets_one_without_targets(tmp_path, packed_rows):
    store = make_store(tmp_path, [4, 4, 4])
    readers = [
        TokenReader(store, packed_rows, batch_size=1, max_length=4, epochs=1, rank=rank, world_size=2)
        for rank in range(2)
    ]
    own, filled = (drain(reader)[-1] for reader in readers)
    assert (own["targets"] != IGNORE).all()
    assert (filled["targets"] == IGNORE).all()
    assert filled["tokens"].shape == own["tokens"].shape
    assert [reader.num_tokens for reader in readers] == [8, 4]


def test_endless_reading_goes_on(tmp_path, packed_rows):
    reader = TokenReader(make_store(tmp_path, [4]), packed_rows, batch_size=2, max_length=4)
    assert [reader.next()["tokens"].tolist() for _ in range(5)] == [[[0, 1, 2, 3]]] * 5
    assert reader.epoch == 5


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"max_length": 0}, {"epochs": 0}, {"rank": 2, "world_size": 2}, {"seed": -1}], ids=str
)
def test_impossible_settings_are_refused(tmp_path, packed_rows, wrong):
    with pytest.raises(UsageError):
        TokenReader(make_store(tmp_path, [4]), packed_rows, **{"batch_size": 1, "max_length": 4, **wrong})


def test_empty_data_is_refused(tmp_path, packed_rows):
    empty = make_store(tmp_path, [4]).selected(np.zeros(1, dtype=bool))
    with pytest.raises(DataError, match="no documents"):
        TokenReader(empty, packed_rows, batch_size=1, max_length=4)
