"""Virtual tokens: what the prompt encoders compute and how large they are, where a text begins, heads beside them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxlm import peft
from mlxlm.errors import UsageError
from mlxlm.models import load_model

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
D = 36  # width of the fixture "llama"
TOKENS = mx.array(np.random.default_rng(0).integers(3, 40, (2, 7)))


def base(name="llama"):
    return load_model(MODELS / name)


def numbers(module):
    return {key: np.array(array, dtype=np.float64) for key, array in tree_flatten(module.parameters())}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("length", "hidden"), [(1, 1), (7, 5)])
def test_an_lstm_encoder_has_its_formulas_parameters(length, hidden, layers):
    method = peft.PTuning(num_tokens=length, encoder="lstm", hidden_dim=hidden, num_layers=layers)
    lstm = sum(2 * 4 * hidden * (width + hidden + 1) for width in [D] + [2 * hidden] * (layers - 1))
    linears = (2 * hidden + 1) * 2 * hidden + (2 * hidden + 1) * D
    counts = peft.count_parameters(peft.apply(base(), method))
    assert counts.trainable == length * D + lstm + linears


@pytest.mark.parametrize("hidden", [None, 5])
def test_an_mlp_encoder_has_its_formulas_parameters(hidden):
    h = hidden or D
    counts = peft.count_parameters(peft.apply(base(), peft.PTuning(num_tokens=7, hidden_dim=hidden)))
    assert counts.trainable == 7 * D + D * h + h + h * h + h + h * D + D


def lstm(x, weights, reverse):
    """One direction over x (length, width); Hochreiter and Schmidhuber 1997 with forget gates, in float64."""
    size = weights["Wh"].shape[1]
    h, c, rows = np.zeros(size), np.zeros(size), []
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    for row in x[::-1] if reverse else x:
        i, f, g, o = np.split(weights["Wx"] @ row + weights["Wh"] @ h + weights["bias"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        rows.append(h)
    return np.array(rows[::-1] if reverse else rows)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_the_encoder_computes_the_papers_function(encoder):
    mx.random.seed(1)
    model = peft.apply(base(), peft.PTuning(num_tokens=6, encoder=encoder, hidden_dim=5))
    model.update(tree_map(lambda a: a + 0.3 * mx.random.normal(a.shape), model.trainable_parameters()))
    weights = numbers(model.prompt)
    x = weights["weight"]
    for layer in range(2 if encoder == "lstm" else 0):
        pair = [
            lstm(x, {key: weights[f"lstm.{layer}.{way}.{key}"] for key in ("Wx", "Wh", "bias")}, reverse=bool(way))
            for way in (0, 1)
        ]
        x = np.concatenate(pair, axis=-1)
    count = 2 if encoder == "lstm" else 3
    for index in range(count):
        x = (np.maximum(x, 0) if index else x) @ weights[f"linears.{index}.weight"].T + weights[f"linears.{index}.bias"]
    assert np.abs(np.array(model.prompt.encoded()) - x).max() < 1e-5
    before = np.array(model(TOKENS))
    assert np.abs(before - np.array(peft.unload(model)(TOKENS))).max() > 1e-4


@pytest.mark.parametrize(("length", "text"), [(3, "hello"), (5, "hello"), (12, "hello")], ids=["cut", "whole", "again"])
def test_a_prompt_begins_with_the_vectors_of_a_text(length, text, tiny):
    model, tokenizer = tiny
    table = np.array(model.embeddings.token.weight)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 5
    peft.apply(model, peft.PromptTuning(num_tokens=length, init="text", text=text), tokenizer=tokenizer)
    assert np.array_equal(np.array(model.prompt.weight), table[(ids * 3)[:length]])


def test_a_prompt_of_random_tokens_and_one_of_noise():
    model = base()
    table = np.array(model.embeddings.token.weight)
    peft.apply(model, peft.PromptTuning(num_tokens=9), name="words")
    rows = np.array(model.prompt.weight)
    assert all((row == table).all(1).any() for row in rows)
    peft.apply(model, peft.PromptTuning(num_tokens=500, init="random"), name="noise")
    assert np.array(model.prompt.weight).std() == pytest.approx(table.std(), rel=0.1)


@pytest.mark.parametrize(
    "wrong",
    [{"init": "text"}, {"text": "hello"}, {"init": "words"}, {"num_tokens": 0}],
    ids=str,
)
def test_settings_of_a_prompt_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UsageError):
        peft.PromptTuning(**wrong)


@pytest.mark.parametrize("family", ["llama-sequence", "bert-tokens"])
@pytest.mark.parametrize("saved", [None, ("head",), (), ("feed_forward.down",)], ids=str)
def test_p_tuning_v2_trains_the_head_or_the_modules_it_is_given(saved, family, tmp_path):
    model = base(family)
    bare, head = np.array(model(TOKENS)), numbers(model.head)
    mx.random.seed(0)
    peft.apply(model, peft.PTuningV2(num_tokens=4, modules_to_save=saved))
    trained = dict(tree_flatten(model.trainable_parameters()))
    beside = {key for key in trained if not key.startswith("prompt")}
    if saved is None or saved == ("head",):
        assert beside == {f"head.{key}" for key in head}
    elif saved == ():
        assert beside == set()
    else:
        assert beside
        assert all(".feed_forward.down." in key for key in beside)
    model.update(tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), model.trainable_parameters()))
    expected = np.array(model(TOKENS))
    peft.save_adapter(model, tmp_path)
    again = peft.load_adapter(base(family), tmp_path)
    assert np.abs(np.array(again(TOKENS)) - expected).max() < 2e-5
    assert np.abs(expected - bare).max() > 1e-4
    peft.unload(again)
    assert np.array_equal(np.array(again(TOKENS)), bare)
    assert all(np.array_equal(array, head[key]) for key, array in numbers(again.head).items())
