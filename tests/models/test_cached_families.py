"""Cached logits are those of the whole text: every family, kind of cache and size of the pieces."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import UsageError
from mlxlm.layers import CacheSpec
from mlxlm.models.loading import load_model

# Rotary, windows in some or all layers, ALiBi in both forms, learned positions, parallel blocks, two norms a branch.
FAMILIES = [
    "llama", "llama-dynamic", "mistral", "gemma2", "gemma3", "bloom", "falcon", "falcon-alibi", "mpt", "gpt2",
    "gpt_bigcode", "gptj", "glm", "phi3", "qwen3",
]  # fmt: skip
LENGTH = 40
FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(params=FAMILIES)
def family(request, loaded_models):
    """Model, tokens (2, L) and logits of the whole rows as numpy."""
    model = loaded_models[request.param]
    vocabulary = model.config.embeddings.vocab_size
    tokens = mx.array(np.random.default_rng(0).integers(5, vocabulary, (2, LENGTH)))
    return model, tokens, np.array(model(tokens))


def in_pieces(model, tokens, cache, sizes):
    """Logits of tokens that come in pieces."""
    outs, start = [], 0
    for size in sizes:
        outs.append(model.logits(model.hidden(tokens[:, start : start + size], cache=cache, context=tokens.shape[1])))
        start += size
    return np.array(mx.concatenate(outs, axis=1))


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [13, 13, 13, 1], [30] + [1] * 10], ids=["1", "13", "30"])
def test_pieces_give_the_logits_of_the_whole(family, sizes):
    model, tokens, wanted = family
    np.testing.assert_allclose(in_pieces(model, tokens, model.make_cache(), sizes), wanted, atol=2e-4)


def test_a_place_on_the_device_gives_the_same(family):
    model, tokens, wanted = family
    cache = model.make_cache(CacheSpec(ragged=True))
    outs = [model.logits(model.hidden(tokens[:, :30], cache=cache, context=LENGTH))]
    for start in range(30, LENGTH, 2):
        cache.place = mx.array(start, dtype=mx.int32)
        outs.append(model.logits(model.hidden(tokens[:, start : start + 2], cache=cache, context=LENGTH)))
    np.testing.assert_allclose(np.array(mx.concatenate(outs, axis=1)), wanted, atol=2e-4)


def test_rows_of_different_lengths_keep_their_own_logits(family):
    model, tokens, _ = family
    if not model.cache_serves(1, 64):
        pytest.skip("rows of one pass share the length that stretches the positions")
    lengths = [17, 31]
    wanted = [np.array(model(tokens[i : i + 1, : n + 6])[0]) for i, n in enumerate(lengths)]
    cache = model.make_cache(CacheSpec(ragged=True))
    padded = mx.where(mx.arange(31) < mx.array(lengths)[:, None], tokens[:, :31], 0)
    logits = model(padded, cache=cache, key_lengths=mx.array(lengths))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(np.array(logits[row, :n]), wanted[row][:n], atol=2e-4)
    for step in range(6):
        following = mx.stack([tokens[row, n + step] for row, n in enumerate(lengths)])
        logits = model(following[:, None], cache=cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(np.array(logits[row, 0]), wanted[row][n + step], atol=2e-4)
    assert cache.row_lengths == [n + 6 for n in lengths]


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.25)])
def test_a_quantized_cache_is_near(family, bits, tolerance):
    model, tokens, wanted = family
    cache = model.make_cache(CacheSpec(bits=bits, group_size=32))
    found = in_pieces(model, tokens, cache, [20] + [1] * 20)
    # The mean error is 2% of the spread of the logits with 8 bits, 25% with 4 (random weights have no redundancy).
    assert np.abs(found - wanted).mean() < tolerance * wanted.std()


def test_bounded_caches_give_the_same_while_they_are_not_full(family):
    model, tokens, wanted = family
    cache = model.make_cache(CacheSpec(max_length=LENGTH))
    np.testing.assert_allclose(in_pieces(model, tokens, cache, [30] + [1] * 10), wanted, atol=2e-4)
    small = [in_pieces(model, tokens, model.make_cache(CacheSpec(max_length=12)), s) for s in ([40], [1] * 40, [9] * 4)]
    if model.cache_serves(1, LENGTH):
        # Products of slopes and places that are rounded to bfloat16 round otherwise where a window begins.
        rounded = getattr(model.config.decoder.layers[0].attention.positions, "rounded", False)
        for other in small[1:]:
            difference = np.abs(small[0][:, : other.shape[1]] - other)
            assert difference.mean() < 0.02 if rounded else difference.max() < 5e-4
        np.testing.assert_allclose(small[0][:, :12], wanted[:, :12], atol=2e-4)


def test_windows_refuse_rows_of_different_lengths(fixture_model):
    model = load_model(fixture_model("mistral"))
    with pytest.raises(UsageError, match="ragged=True"):
        model(mx.array([[5, 6], [7, 0]]), cache=model.make_cache(), key_lengths=mx.array([2, 1]))


def test_a_decoder_behind_an_encoder_takes_every_kind(fixture_model):
    model = load_model(fixture_model("t5"))
    source, answer = mx.array([[5, 6, 7, 8, 9]]), mx.array(np.random.default_rng(1).integers(3, 40, (1, 20)))
    wanted = np.array(model(source, decoder_tokens=answer))
    memory = model.encode(source)
    for spec, atol in ((CacheSpec(), 1e-4), (CacheSpec(ragged=True), 1e-4), (CacheSpec(max_length=20), 1e-4)):
        cache = model.make_cache(spec)
        hidden = [model.decode(answer[:, i : i + 4], memory, cache=cache) for i in range(0, 20, 4)]
        np.testing.assert_allclose(np.array(model.logits(mx.concatenate(hidden, axis=1))), wanted, atol=atol)
    cache = model.make_cache(CacheSpec(bits=8, group_size=32))
    hidden = [model.decode(answer[:, i : i + 1], memory, cache=cache) for i in range(20)]
    found = np.array(model.logits(mx.concatenate(hidden, axis=1)))
    assert np.abs(found - wanted).max() < 0.02 * wanted.std() * 5
