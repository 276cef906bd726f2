"""The attention layer, product and additive, against plain sums over heads and keys."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from finite_differences import assert_module_follows, normal, numbers, randomized

from mlxlm.errors import AttentionError, ConfigError
from mlxlm.kernels import AttentionMask
from mlxlm.layers import (
    AdditiveAttentionSpec,
    AlibiSpec,
    AttentionSpec,
    KeyValueCache,
    LayerNormSpec,
    RMSNormSpec,
    RotarySpec,
    Scope,
    TokenPositions,
    alibi_slopes,
)

BASE = AttentionSpec(dim=6, num_heads=4, num_kv_heads=2, head_dim=4, causal=True, bias=True, output_bias=True)
SPECS = {
    "multi-head": replace(BASE, num_kv_heads=4),
    "multi-query": replace(BASE, num_kv_heads=1, bias=False, output_bias=False),
    "grouped": BASE,
    "both-directions": replace(BASE, causal=False),
    "window": replace(BASE, window=2),
    "softcap": replace(BASE, softcap=0.8, scale=1.1),
    "clip": replace(BASE, clip=0.6),
    "query-key-norm": replace(BASE, query_norm=RMSNormSpec(dim=4, offset=1.0), key_norm=LayerNormSpec(dim=4)),
    "alibi": replace(BASE, positions=AlibiSpec(num_heads=4, divisor=2.0)),
    "rotary": replace(BASE, positions=RotarySpec(dim=4, base=50.0)),
}


def normed(w, name, x):
    if f"{name}.bias" in w:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
    return (
        x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + w[f"{name}.weight"]) if f"{name}.weight" in w else x
    )


def formula_of(spec, key_lengths=None):
    """One head, one query at a time (Vaswani et al. 2017, section 3.2, and what the spec adds to it)."""

    def turned(x, position):
        if not isinstance(spec.positions, RotarySpec):
            return x
        z = (x[:2] + 1j * x[2:]) * np.exp(1j * position * 50.0 ** (-np.arange(2) / 2))
        return np.concatenate([z.real, z.imag])

    def formula(w, x, memory=None):
        source = x if memory is None else memory
        parts = {}
        for name, given in (("query", x), ("key", source), ("value", source)):
            projected = given @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)
            projected = projected if spec.clip is None else np.clip(projected, -spec.clip, spec.clip)
            parts[name] = normed(w, f"{name}_norm", projected.reshape(*given.shape[:2], -1, spec.head_dim))
        scale = spec.scale or spec.head_dim**-0.5
        out = np.zeros(parts["query"].shape)
        for b, i, h in np.ndindex(out.shape[:3]):
            shared = h * spec.num_kv_heads // spec.num_heads
            logits, values = [], []
            for j in range(source.shape[1]):
                if key_lengths is not None and j >= key_lengths[b]:
                    continue
                if memory is None and spec.causal and j > i:
                    continue
                if memory is None and spec.window is not None and j <= i - spec.window:
                    continue
                query, key = turned(parts["query"][b, i, h], i), turned(parts["key"][b, j, shared], j)
                logit = scale * (query * key).sum()
                logit = logit if spec.softcap is None else spec.softcap * np.tanh(logit / spec.softcap)
                if isinstance(spec.positions, AlibiSpec):
                    logit -= alibi_slopes(4)[h] * abs(i - j) / spec.positions.divisor
                logits.append(logit)
                values.append(parts["value"][b, j, shared])
            weights = np.exp(np.array(logits) - max(logits))
            out[b, i, h] = (weights / weights.sum()) @ np.array(values)
        return out.reshape(*x.shape[:2], -1) @ w["output.weight"].T + w.get("output.bias", 0.0)

    return formula


@pytest.mark.parametrize("name", SPECS)
def test_self_attention_and_its_gradients_follow_the_formula(name):
    spec = SPECS[name]
    module = randomized(spec.build())

    def call(m, x):
        return m(x, Scope(TokenPositions(4)))

    assert_module_follows(module, call, formula_of(spec), normal(2, 4, 6), tolerance=1e-3)


def test_cross_attention_sees_all_of_the_memory_that_is_valid():
    lengths = np.array([5, 2])
    module = randomized(BASE.build())

    def call(m, x, memory):
        return m(x, Scope(TokenPositions(3), memory_mask=AttentionMask(key_lengths=mx.array(lengths))), None, memory)

    assert_module_follows(module, call, formula_of(BASE, lengths), normal(2, 3, 6), normal(2, 5, 6), tolerance=1e-3)


def test_padding_is_not_seen():
    module, x = randomized(BASE.build()), mx.array(normal(2, 5, 6), dtype=mx.float32)
    lengths = np.array([5, 3])
    out = module(x, Scope(TokenPositions(5), AttentionMask(key_lengths=mx.array(lengths))))
    expected = formula_of(BASE, lengths)(numbers(module), np.array(x, dtype=np.float64))
    assert np.abs(np.array(out)[1, :3] - expected[1, :3]).max() < 1e-5


@pytest.mark.parametrize("name", ["grouped", "window", "alibi", "rotary", "query-key-norm"])
def test_steps_with_a_cache_equal_one_pass(name):
    module, x = randomized(SPECS[name].build()), mx.array(normal(2, 7, 6), dtype=mx.float32)
    whole, cache = module(x, Scope(TokenPositions(7))), KeyValueCache()
    steps = []
    for start, stop in ((0, 3), (3, 4), (4, 6), (6, 7)):
        steps.append(module(x[:, start:stop], Scope(TokenPositions(stop - start, start)), cache))
    assert mx.abs(mx.concatenate(steps, axis=1) - whole).max().item() < 1e-5


def test_a_memory_is_projected_once():
    module, memory = randomized(BASE.build()), mx.array(normal(1, 5, 6), dtype=mx.float32)
    cache, scope = KeyValueCache(), Scope(TokenPositions(2))
    x = mx.array(normal(1, 2, 6), dtype=mx.float32)
    first = module(x, scope, cache, memory)
    held = cache.memory
    assert mx.array_equal(module(x, scope, cache, memory), first)
    assert cache.memory is held


def test_dropout_acts_in_training_only():
    module, x = randomized(replace(BASE, dropout=0.5).build()), mx.array(normal(1, 6, 6), dtype=mx.float32)
    scope = Scope(TokenPositions(6))
    still = module(x, scope)
    assert mx.array_equal(module(x, scope), still)
    module.train()
    assert not mx.array_equal(module(x, scope), still)


def test_heads_must_share_evenly():
    with pytest.raises(ConfigError, match="4 query heads can't share 3 key/value heads"):
        replace(BASE, num_kv_heads=3)


def additive(lengths=None):
    def formula(w, query, memory):
        out = np.zeros((*query.shape[:2], memory.shape[2]))
        for b, i in np.ndindex(query.shape[:2]):
            seen = memory[b] if lengths is None else memory[b, : lengths[b]]
            hidden = np.tanh(w["query.weight"] @ query[b, i] + seen @ w["key.weight"].T)
            weights = np.exp(hidden @ w["score.weight"][0])
            out[b, i] = weights / weights.sum() @ seen
        return out

    return formula


@pytest.mark.parametrize("lengths", [None, (5, 2)], ids=["whole", "padded"])
def test_additive_attention_and_its_gradients_follow_the_formula(lengths):
    module = randomized(AdditiveAttentionSpec(query_dim=3, memory_dim=4, hidden_dim=6).build())
    valid = None if lengths is None else mx.array(lengths)
    query, memory = normal(2, 3, 3), normal(2, 5, 4)
    assert_module_follows(module, lambda m, q, k: m(q, k, valid), additive(lengths), query, memory)
    weights = module.weights(mx.array(query, dtype=mx.float32), mx.array(memory, dtype=mx.float32), valid)
    assert mx.allclose(weights.sum(axis=-1), mx.ones((2, 3)), atol=1e-5)


def test_additive_attention_names_shapes_that_do_not_fit():
    module = AdditiveAttentionSpec(query_dim=3, memory_dim=4, hidden_dim=6).build()
    with pytest.raises(AttentionError, match=r"expected \(B, L, 3\) and \(B, S, 4\)"):
        module(mx.zeros((2, 3)), mx.zeros((2, 5, 4)))
