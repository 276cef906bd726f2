"""Bits by sensitivity, error compensation and scaling: against their definitions, on a small random model."""

from __future__ import annotations

import json
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.checkpoint import dequantize
from mlxlm.conversion import MlxTarget, Recipe, convert, parse_form, parse_layer, quantization, read_recipe, recipe_json
from mlxlm.conversion.calibrated import prepare
from mlxlm.conversion.calibration import calibration, gram_matrices, layer_inputs, losses, perplexity, recorded
from mlxlm.conversion.compensation import compensated
from mlxlm.conversion.quantizing import quantize
from mlxlm.conversion.recipes import quantizable
from mlxlm.conversion.sensitivity import Choice, allocate, fisher, sensitive_recipe
from mlxlm.errors import ConfigError, DataError, UsageError
from mlxlm.models import load_model

TOKENS = mx.array(np.random.default_rng(1).integers(0, 60, (6, 24)))


@pytest.fixture
def model(wide):
    return load_model(wide("llama"))


def modules_of(model):
    return quantizable(model.config, model.source.family.rules(model.config, "mlx"))


def test_perplexity_is_that_of_the_logits(model):
    logits = np.array(model(TOKENS[:, :-1]), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    targets = np.array(TOKENS[:, 1:])
    expected = np.exp(-np.take_along_axis(logs, targets[..., None], -1).mean())
    assert perplexity(model, TOKENS) == pytest.approx(expected, rel=1e-5)


def test_fisher_information_is_the_mean_of_squared_gradients(model):
    path = "decoder.layers.1.feed_forward.up"
    found = np.array(fisher(model, [path], TOKENS[:2])[path], np.float64)
    weight = model.decoder.layers[1].feed_forward.up.weight
    for row, column in ((0, 0), (5, 7), (100, 90)):
        gradients = []
        for text in (TOKENS[:1], TOKENS[1:2]):
            ends = []
            for step in (1e-2, -1e-2):
                moved = np.array(weight)
                moved[row, column] += step
                model.update(tree_unflatten([(f"{path}.weight", mx.array(moved))]))
                ends.append(losses(model, text).item())
            gradients.append((ends[0] - ends[1]) / 2e-2)
        model.update(tree_unflatten([(f"{path}.weight", weight)]))
        assert found[row, column] == pytest.approx(np.mean(np.square(gradients)), rel=0.2, abs=2e-8)


def test_allocation_is_nearly_the_best_of_all_and_within_the_budget():
    rng = np.random.default_rng(2)
    forms = [quantization(bits) for bits in (2, 3, 4, 8)]
    for _ in range(20):
        choices = {
            name: [
                Choice(
                    form=form, cost=float(rng.uniform(0.5, 2) * 4.0**-form.bits * weight), nbytes=form.bits * int(size)
                )
                for form in forms
            ]
            for name, weight, size in zip("abcd", rng.uniform(1, 100, 4), rng.integers(10, 99, 4), strict=True)
        }
        budget = sum(some[1].nbytes for some in choices.values()) + 40
        chosen = allocate(choices, budget)
        assert sum(choice.nbytes for choice in chosen.values()) <= budget
        every = [some for some in product(*choices.values()) if sum(choice.nbytes for choice in some) <= budget]
        best = min(sum(choice.cost for choice in some) for some in every)
        largest = max(some[0].cost for some in choices.values())
        assert sum(choice.cost for choice in chosen.values()) <= best + largest
    with pytest.raises(UsageError, match="in the smallest form; ask for a larger one"):
        allocate(choices, 10)


def test_a_recipe_by_sensitivity_has_the_size_and_keeps_what_is_fixed(model, tmp_path):
    modules = modules_of(model)
    total = sum(array.size for _, array in tree_flatten(model.parameters())) * 7 // 8
    fixed = Recipe(default=quantization(4, 32), layers=(("*.o_proj", quantization(8, 32)),), embeddings=False)
    forms = [quantization(bits, 32) for bits in (2, 3, 4, 6, 8)]
    recipe = sensitive_recipe(model, modules, TOKENS, total_bytes=total, forms=forms, dtype=mx.float32, fixed=fixed)
    result = convert(model.source.path, tmp_path / "out", MlxTarget(recipe=recipe))
    assert 0.9 * total < result.nbytes <= total
    chosen = recipe.forms(modules)
    assert "embeddings.token" not in chosen
    assert {form.bits for path, form in chosen.items() if path.endswith("attention.output")} == {8}
    assert len({form.bits for form in chosen.values()}) > 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compensation_lessens_the_error_of_outputs(bits):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(400, 128)) @ rng.normal(size=(128, 128)) * 0.1  # correlated inputs
    weight, gram = mx.array(rng.normal(size=(40, 128)).astype(np.float32)), mx.array((x.T @ x / 400).astype(np.float32))
    form = quantization(bits, 32)
    packed, values = compensated(weight, gram, form, mx.float32)
    assert np.allclose(np.array(dequantize(*packed, form, mx.float32)), np.array(values), atol=1e-5)
    plain = dequantize(*quantize(weight, form), form, mx.float32)

    def error(rounded):
        return np.linalg.norm(x @ (np.array(rounded, np.float64) - np.array(weight, np.float64)).T)

    assert error(values) < 0.8 * error(plain)


def test_without_correlations_compensation_is_plain_rounding():
    weight, form = mx.random.normal((8, 64), key=mx.random.key(1)), quantization(4, 32)
    packed, _ = compensated(weight, mx.eye(64), form, mx.float32)
    assert all(mx.allclose(a, b).item() for a, b in zip(packed[1:], quantize(weight, form)[1:], strict=True))
    assert mx.array_equal(packed[0], quantize(weight, form)[0])


def test_inputs_that_never_come_are_no_obstacle():
    gram = mx.eye(64) * mx.concatenate([mx.zeros(10), mx.ones(54)])
    _, values = compensated(mx.ones((4, 64)), gram, quantization(4, 32), mx.float32)
    assert mx.isfinite(values).all().item()
    with pytest.raises(UsageError, match="not for mxfp4"):
        compensated(mx.ones((4, 64)), gram, quantization(mode="mxfp4"), mx.float32)


def test_gram_matrices_are_means_over_what_modules_get(model):
    inputs = layer_inputs(model, TOKENS)
    seen = []
    with recorded(model.decoder.layers[0], lambda path, x: seen.append((path, x))):
        for x, scope in inputs:
            model.decoder.layers[0](x, scope, None, None)
    rows = np.concatenate([np.array(x).reshape(-1, 128) for path, x in seen if path == "attention.query"]).astype(float)
    grams, sizes = gram_matrices(model.decoder.layers[0], inputs)
    assert set(grams) == {path for path, _ in seen}
    assert np.allclose(np.array(grams["attention.query"]), rows.T @ rows / len(rows), atol=1e-4)
    assert np.allclose(np.array(sizes["attention.query"]), np.abs(rows).mean(axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("compensate", "scale"), [(True, False), (False, True), (True, True)], ids=["gptq", "awq", "both"]
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_prepared_weights_are_what_the_result_computes(name, compensate, scale, wide, tmp_path):
    model = load_model(wide(name))
    before = np.array(model(TOKENS))
    forms = Recipe(default=quantization(4, 32), embeddings=False, head=False).forms(modules_of(model))
    made = prepare(model, forms, TOKENS, compensate=compensate, scale=scale, dtype=mx.float32)
    assert set(made.prepared) == set(forms)
    assert bool(made.floats) == scale
    recipe = Recipe(default=quantization(4, 32), embeddings=False, head=False)
    target = MlxTarget(recipe=recipe, prepared=made.prepared, floats=made.floats, method="test")
    convert(model.source.path, tmp_path / "out", target)
    result = np.array(load_model(tmp_path / "out", quantized=False)(TOKENS))
    assert np.abs(result - np.array(model(TOKENS))).max() < 1e-3 * np.abs(before).max()
    assert np.linalg.norm(result - before) < 0.5 * np.linalg.norm(before)


def test_scaling_alone_changes_nothing_that_is_computed(wide):
    from mlxlm.conversion.scaling import scale_layer

    model = load_model(wide("llama"))
    before = np.array(model(TOKENS))
    forms = Recipe(default=quantization(2, 32)).forms(modules_of(model))
    layer = model.decoder.layers[0]
    changed = scale_layer(
        layer, "decoder.layers.0.", forms, *gram_matrices(layer, layer_inputs(model, TOKENS)), mx.float32
    )
    assert "decoder.layers.0.attention_residual.norm_in.weight" in changed
    assert np.abs(np.array(model(TOKENS)) - before).max() < 1e-4


# ---------------------------------------------------------------------------------------------------- text and recipes


def test_rows_of_text_are_either_measured_or_held_out(tiny):
    _, tokenizer = tiny
    data = calibration(tokenizer, "abc def ghi " * 40, rows=3, length=20)
    assert data.measured.shape == data.held_out.shape == (3, 20)
    with pytest.raises(DataError, match="has 8 tokens; at least 40 are needed"):
        calibration(tokenizer, "abc def ", length=20)


def test_only_language_models_are_measured(wide):
    with pytest.raises(UsageError, match="predict the next word"):
        perplexity(load_model(wide("bert")), TOKENS)


def test_recipes_are_read_back(tmp_path):
    layers = (("a.*", quantization(8)), ("b", None), ("c", quantization(mode="mxfp4")))
    recipe = Recipe(default=quantization(3, 32), layers=layers, head=False)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_json(recipe)))
    assert read_recipe(tmp_path / "recipe.json") == recipe
    (tmp_path / "recipe.json").write_text('{"default": 4, "layer": {}}')
    with pytest.raises(UsageError, match="a recipe has default, layers"):
        read_recipe(tmp_path / "recipe.json")
    assert parse_form("6:32", "x") == quantization(6, 32)
    assert parse_form("mxfp8", "x") == quantization(mode="mxfp8")
    assert parse_form("none", "x") is None
    assert parse_layer("*.v_proj=8") == ("*.v_proj", quantization(8))
    for text in ("4:", "4:x", "x", "4.5", ""):
        if text != "4:":
            with pytest.raises(UsageError, match="x"):
                parse_form(text, "x")
    with pytest.raises(ConfigError, match="group_size is 48"):
        parse_form("4:48", "x")
