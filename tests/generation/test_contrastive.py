"""Contrastive search against the formula: in float64 over transformers' hidden states without a cache."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import SamplingError, UsageError
from mlxlm.generation import ContrastiveSearch, Guidance, Speculation, generate, regex, stream_generate
from mlxlm.generation.contrastive import contrastive_decode
from mlxlm.generation.sampling import Sampling
from mlxlm.layers import Cache, CacheSpec, KeyValueCache, WindowCache

GOLDEN = json.loads((Path(__file__).parent.parent / "fixtures" / "goldens" / "contrastive.json").read_text())
NAMES = sorted({row["fixture"] for row in GOLDEN["rows"]})


def searched(model, prompt, count, *, spec=None, sampling=None, words=None, likelihoods=None, **options):
    """Choices of a search, and the cache behind it."""
    cache = model.make_cache(spec)
    start = model.config.decoder_start
    words = words or model.config.embeddings.vocab_size
    sampler = (sampling or Sampling()).sampler(prompt if start is None else [start], words)
    search = ContrastiveSearch(**options)
    return list(contrastive_decode(model, list(prompt), cache, sampler, count, search, likelihoods)), cache


def tokens(*arguments, **options):
    return [choice.token for choice in searched(*arguments, **options)[0]]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_formula_over_transformers(name, loaded_models):
    model = loaded_models[name]
    rows = [row for row in GOLDEN["rows"] if row["fixture"] == name]
    assert len(rows) == 4
    for row, count in zip(rows, (14, 6, 6, 6), strict=True):
        found = tokens(model, row["prompt"], count, alpha=row["alpha"], top_k=row["top_k"])
        assert found == row["answer"][:count], row


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_without_a_penalty_the_likeliest_token_wins(loaded_models, name):
    model, words = loaded_models[name], 40
    prompt = [5, 9, 20, 9]
    greedy = searched_greedy(model, prompt, words)
    found, _ = searched(model, prompt, 10, words=words, alpha=0.0, top_k=3, likelihoods=0)
    assert [choice.token for choice in found] == [choice.token for choice in greedy]
    np.testing.assert_allclose([c.log_probability for c in found], [c.log_probability for c in greedy], atol=1e-4)
    assert tokens(model, prompt, 10, words=words, alpha=0.8, top_k=3) != [choice.token for choice in greedy]


def searched_greedy(model, prompt, words):
    from mlxlm.generation.decoding import decode

    start = model.config.decoder_start
    sampler = Sampling().sampler(prompt if start is None else [start], words)
    return list(decode(model, prompt, model.make_cache(), sampler, 10, 0))


@pytest.mark.parametrize(
    "spec", [CacheSpec(ragged=True), CacheSpec(max_length=40), CacheSpec(bits=8, group_size=32)], ids=repr
)
def test_every_cache_serves(loaded_models, spec):
    model = loaded_models["gemma3"]
    options = {"alpha": 0.6, "top_k": 4}
    # A prompt shorter than the sinks that a bounded cache keeps, and one that needs them all.
    for prompt, count in (([7, 8], 12), ([5, 9, 20, 9, 31] * 4, 12)):
        found, cache = searched(model, prompt, count, spec=spec, **options)
        assert cache.length == len(prompt) + count
        assert cache.row_lengths == [cache.length]
        if spec.bits is None:
            assert [choice.token for choice in found] == tokens(model, prompt, count, **options)


def test_a_window_that_moves_on_is_that_of_a_fresh_pass(loaded_models):
    """Behind sinks and a window, each decision is the one that a cache read anew gives."""
    model, spec, prompt = loaded_models["llama"], CacheSpec(max_length=14), [5, 9]
    answer = tokens(model, prompt, 24, spec=spec, alpha=0.7, top_k=4)
    for place in (1, 23):
        cache = model.make_cache(spec)
        hidden = [model.hidden(mx.array([[token]]), cache=cache)[:, 0] for token in prompt + answer[:place]]
        shares = np.array(mx.softmax(model.logits(hidden[-1])[0]), dtype=np.float64)
        seen = np.array(mx.concatenate(hidden), dtype=np.float64)
        seen /= np.linalg.norm(seen, axis=-1, keepdims=True)
        worth = {}
        for token in np.argsort(-shares)[:4].tolist():
            own = model.make_cache(spec)
            for before in prompt + answer[:place]:
                model.hidden(mx.array([[before]]), cache=own)
            last = np.array(model.hidden(mx.array([[token]]), cache=own)[0, 0], dtype=np.float64)
            worth[token] = 0.3 * shares[token] - 0.7 * (seen @ (last / np.linalg.norm(last))).max()
        assert max(worth, key=worth.get) == answer[place]


@pytest.mark.parametrize("make", [KeyValueCache, lambda: WindowCache(3, 2)], ids=["growing", "window"])
def test_rows_adopt_the_last_token_of_one(make):
    """As if that row had been read alone, and the others copied from it."""
    drawn = np.random.default_rng(0)
    together, alone = Cache([make()]), Cache([make()])
    for step in range(9):
        key, value = (mx.array(drawn.standard_normal((3, 1, 1, 4)), dtype=mx.float32) for _ in range(2))
        row = step % 3
        together[0].update(key, value)
        together.adopt(mx.array(row))
        alone[0].update(key[row : row + 1], value[row : row + 1])
        for held, wanted in zip(together[0].filled(), alone[0].filled(), strict=True):
            np.testing.assert_array_equal(np.array(held[0]), np.repeat(np.array(wanted[0]), 3, axis=0))
    ragged = Cache([KeyValueCache()])
    ragged[0].update(key, value)
    ragged.advance(1, [1, 1, 0])
    with pytest.raises(UsageError, match="different lengths"):
        ragged.adopt(mx.array(0))


def test_a_constraint_and_penalties_are_kept(tiny):
    model, tokenizer = tiny
    options = {"max_tokens": 12, "contrastive": ContrastiveSearch(alpha=0.9, top_k=6)}
    text = generate(model, tokenizer, "one", constraint=regex(tokenizer, "[ab]{5}c"), **options)
    assert text[5:] == "c"
    assert set(text[:5]) <= {"a", "b"}
    banned = dict.fromkeys((*tokenizer.stop_ids, *tokenizer.encode("aeiou")), -1e9)
    text = generate(model, tokenizer, "one", logit_bias=banned, **options)
    assert len(text) == 12
    assert not set(text) & set("aeiou")
    again = list(stream_generate(model, tokenizer, "one", likelihoods=2, logit_bias=banned, **options))
    assert "".join(piece.text for piece in again) == text
    assert {len(piece.likeliest) for piece in again} == {2}


def test_whoever_stops_early_finds_what_was_given_in_the_cache(tiny):
    model, tokenizer = tiny
    cache = model.make_cache()
    options = {"contrastive": ContrastiveSearch(), "logit_bias": dict.fromkeys(tokenizer.stop_ids, -1e9)}
    pieces = stream_generate(model, tokenizer, [5, 6, 7], cache=cache, max_tokens=9, **options)
    given = [next(pieces).token for _ in range(4)]
    pieces.close()
    assert cache.row_lengths == [7]
    wanted = np.array(model(mx.array([[5, 6, 7, *given, 8]]))[0, -1])
    np.testing.assert_allclose(np.array(model(mx.array([[8]]), cache=cache)[0, 0]), wanted, atol=1e-4)


def test_what_does_not_go_is_said(tiny):
    model, tokenizer = tiny
    for options, words in (
        ({"alpha": 1.5}, "alpha of contrastive search is 1.5"),
        ({"alpha": float("nan")}, "nan"),
        ({"top_k": 1}, "valid are 2 to 256"),
        ({"top_k": 257}, "valid are 2 to 256"),
    ):
        with pytest.raises(SamplingError, match=words):
            ContrastiveSearch(**options)
    contrastive = ContrastiveSearch()
    for option in ({"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        with pytest.raises(SamplingError, match="nothing at random"):
            generate(model, tokenizer, "a", contrastive=contrastive, **option)
    for option in ({"speculation": Speculation(prompt_lookup=2)}, {"guidance": Guidance(scale=2, negative=(9,))}):
        with pytest.raises(UsageError, match="contrastive search goes with no"):
            generate(model, tokenizer, "a", contrastive=contrastive, **option)
    cache = model.make_cache()
    model(mx.array([[5, 6]]), cache=cache)
    with pytest.raises(UsageError, match="no filled cache"):
        generate(model, tokenizer, [5, 6, 7], contrastive=contrastive, cache=cache)
