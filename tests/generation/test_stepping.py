"""Decoding steps in every form give the same logits and fill the cache alike."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxlm
from mlxlm.errors import PromptError, UsageError
from mlxlm.generation.stepping import Stepping, forget_steps, make_step
from mlxlm.layers import AttentionSpec, CacheSpec, FeedForwardSpec, Scope, TokenPositions
from mlxlm.models.loading import load_model

FAMILIES = ["llama", "gemma2", "gemma3", "bloom", "falcon", "gpt2", "glm", "gpt_bigcode", "phi", "qwen3"]


@pytest.fixture
def uncompiled():
    """On the CPU every fused kernel would be compiled by a C++ compiler; the operations are the same without."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def check(model, compiled, ahead=10):
    tokens = mx.array(np.random.default_rng(0).integers(5, model.config.embeddings.vocab_size, (2, 24)))
    wanted = np.array(model(tokens))
    step = make_step(model, Stepping(compiled=compiled))
    cache = model.make_cache(CacheSpec(ragged=compiled == "whole"))
    model.hidden(tokens[:, : 24 - ahead], cache=cache)
    for place in range(24 - ahead, 24):
        np.testing.assert_allclose(np.array(step(tokens[:, place], cache)), wanted[:, place], atol=2e-4)
    assert cache.length == 24
    cache.trim(20)
    np.testing.assert_allclose(np.array(step(tokens[:, 20], cache)), wanted[:, 20], atol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("compiled", ["no", "pieces", "whole"])
def test_a_step_gives_the_logits_of_the_whole(fixture_model, uncompiled, name, compiled):
    check(load_model(fixture_model(name)), compiled)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["pieces", "whole"])
def test_compiled_steps_give_them_too(fixture_model, compiled):
    check(load_model(fixture_model("llama")), compiled, ahead=3)


@pytest.mark.parametrize("compiled", ["no", "pieces", "whole"])
def test_rows_of_different_lengths_step_together(fixture_model, uncompiled, compiled):
    model = load_model(fixture_model("gemma2"))
    tokens = mx.array(np.random.default_rng(0).integers(5, 60, (2, 24)))
    wanted, lengths = np.array(model(tokens)), [9, 14]
    cache = model.make_cache(CacheSpec(ragged=True))
    model.hidden(tokens[:, :14], cache=cache, key_lengths=mx.array(lengths))
    step = make_step(model, Stepping(compiled=compiled))
    for more in range(5):
        logits = np.array(step(mx.stack([tokens[row, n + more] for row, n in enumerate(lengths)]), cache))
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(logits[row], wanted[row, n + more], atol=2e-4)
    assert cache.row_lengths == [14, 19]


def test_joining_changes_no_name_and_no_weight(fixture_model):
    model = load_model(fixture_model("llama"))
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    nbytes = sum(array.nbytes for array in before.values())
    model.join_projections()
    after = dict(tree_flatten(model.parameters()))
    assert list(before) == list(after)
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
    assert sum(array.nbytes for array in after.values()) == nbytes
    attention = model.decoder.layers[0].attention
    assert attention._joined is not None
    wanted = model(mx.array([[5, 6, 7]]))
    attention.query.weight = attention.query.weight * 2
    doubled = model(mx.array([[5, 6, 7]]))
    assert attention._joined is None
    assert mx.abs(doubled - wanted).max().item() > 1e-3


def test_joined_quantized_projections_are_those_apart():
    from mlx import nn

    spec = AttentionSpec(dim=64, num_heads=4, num_kv_heads=2, head_dim=16, causal=True, bias=True)
    feed_forward = FeedForwardSpec(dim=64, hidden_dim=96, activation="silu", gated=True).build()
    attention, x = spec.build(), mx.array(np.random.default_rng(0).standard_normal((2, 5, 64)), dtype=mx.float32)
    for module, run in (
        (attention, lambda: attention(x, Scope(TokenPositions(5)))),
        (feed_forward, lambda: feed_forward(x)),
    ):
        nn.quantize(module, group_size=32, bits=4)
        apart = np.array(run())
        module.join()
        assert "scales" in module._joined.parts
        np.testing.assert_allclose(np.array(run()), apart, atol=1e-5)


def test_joining_leaves_adapters_and_gradients_alone(fixture_model):
    from mlx import nn

    model = load_model(fixture_model("llama"))
    tokens = mx.array([[5, 6, 7, 8]])

    def loss(model):
        return model(tokens).square().mean()

    wanted = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    model.join_projections()
    found = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    assert list(found) == list(wanted)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(gradient), atol=1e-5, err_msg=name)


def test_what_is_joined_is_saved_as_ever(tiny, tmp_path):
    model, tokenizer = tiny
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    model.join_projections()
    mlxlm.save(model, tokenizer, tmp_path / "saved")
    for name, array in tree_flatten(load_model(tmp_path / "saved").parameters()):
        np.testing.assert_array_equal(np.array(array), before[name], err_msg=name)


def test_training_keeps_no_second_copy_of_the_weights(fixture_model):
    model = load_model(fixture_model("llama"))
    model.eval().join_projections()
    block = model.decoder.layers[0]
    assert block.attention._joined is not None
    model.train()
    assert block.attention._joined is None
    assert block.feed_forward._joined is None


def test_compiled_steps_are_kept_until_a_weight_changes(fixture_model):
    model = load_model(fixture_model("llama"))
    first = make_step(model, Stepping(compiled="pieces"))
    assert make_step(model, Stepping(compiled="pieces")) is first
    model.decoder.norm.weight = model.decoder.norm.weight * 2
    second = make_step(model, Stepping(compiled="pieces"))
    assert second is not first
    forget_steps(model)
    assert make_step(model, Stepping(compiled="pieces")) is not second


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_steps_launched_ahead_leave_no_trace(tiny, monkeypatch, ahead):
    model, tokenizer = tiny
    options = {"max_tokens": 12, "logit_bias": dict.fromkeys(tokenizer.stop_ids, -1e9)}
    wanted = [piece.token for piece in mlxlm.stream_generate(model, tokenizer, [5, 6, 7], **options)]
    monkeypatch.setenv("MLXLM_DECODE", f"ahead={ahead}")
    cache = model.make_cache()
    pieces = mlxlm.stream_generate(model, tokenizer, [5, 6, 7], cache=cache, **options)
    assert [next(pieces).token for _ in range(4)] == wanted[:4]
    pieces.close()
    assert cache.length == 7
    longer = [5, 6, 7, *wanted[:5]]
    again = mlxlm.stream_generate(model, tokenizer, longer, cache=cache, **options)
    assert [piece.token for piece in again][:7] == wanted[5:]
    bounded = model.make_cache(CacheSpec(max_length=40))
    assert [p.token for p in mlxlm.stream_generate(model, tokenizer, [5, 6, 7], cache=bounded, **options)] == wanted


def test_options_are_read_from_text(monkeypatch):
    assert Stepping.parse("joined=0,compiled=pieces,ahead=4") == Stepping(joined=False, compiled="pieces", ahead=4)
    for text, words in (
        ("compiled=pices", "did you mean 'pieces'"),
        ("ahed=2", "did you mean 'ahead'"),
        ("ahead=0", "at least 1"),
        ("ahead=x", "is a number, not 'x'"),
    ):
        with pytest.raises(UsageError, match=words):
            Stepping.parse(text)


def test_a_whole_step_says_which_cache_it_needs(tiny):
    model, _ = tiny
    step = make_step(model, Stepping(compiled="whole"))
    with pytest.raises(UsageError, match="ragged=True"):
        step(mx.array([5]), model.make_cache())


@pytest.mark.parametrize("compiled", ["no", "pieces", "whole"])
def test_positions_that_are_used_up_are_one_clear_line(fixture_model, uncompiled, compiled):
    model = load_model(fixture_model("gpt2"))
    cache = model.make_cache(CacheSpec(ragged=True))
    model.hidden(mx.full((1, model.config.max_length), 5, dtype=mx.int32), cache=cache)
    with pytest.raises(PromptError, match="49 tokens are more than the 48 positions"):
        make_step(model, Stepping(compiled=compiled))(mx.array([5]), cache)


def test_a_compiled_step_is_made_anew_when_another_adapter_is_active(fixture_model, uncompiled):
    from mlxlm.peft import Lora, activate, apply

    model = apply(load_model(fixture_model("llama")), Lora()).eval()
    stepping = Stepping(compiled="pieces")
    first = make_step(model, stepping)
    assert make_step(model, stepping) is first
    activate(model, None)
    assert make_step(model, stepping) is not first


def test_an_interrupt_in_a_step_leaves_the_cache_as_it_was(fixture_model, uncompiled):
    model = load_model(fixture_model("llama"))
    step = make_step(model, Stepping(compiled="whole"))
    tokens = mx.array([[5, 6, 7, 8, 9]])
    cache = model.make_cache(CacheSpec(ragged=True))
    model.hidden(tokens[:, :4], cache=cache)

    def interrupted(tokens, place, cache):
        raise KeyboardInterrupt

    forward, step._forward = step._forward, interrupted
    with pytest.raises(KeyboardInterrupt):
        step(tokens[:, 4], cache)
    step._forward = forward
    np.testing.assert_allclose(np.array(step(tokens[:, 4], cache)), np.array(model(tokens))[:, 4], atol=2e-4)
