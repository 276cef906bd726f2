"""Every method: an unchanged start, files that say the same, taking out, merging."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import mlxlm
from mlxlm import peft
from mlxlm.errors import ConfigError, MlxlmError, UsageError
from mlxlm.models import load_model

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
FAMILIES = ["llama", "gpt2", "bert-sequence", "t5", "phi3", "gpt_neox"]
NO_BIASES = {"t5", "phi3"}


def base(name):
    return load_model(MODELS / name)


def logits(model, length=9):
    tokens = mx.array(np.random.default_rng(0).integers(3, 40, (2, length)))
    return model(tokens, decoder_tokens=tokens[:, :5]) if model.config.has_memory else model(tokens)


def stirred(model):
    """The model with its trained parameters moved by noise."""
    moved = tree_map(lambda array: array + 0.05 * mx.random.normal(array.shape), model.trainable_parameters())
    model.update(moved)
    return model


def gap(one, other):
    return float(mx.abs(one - other).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in peft.METHODS if name != "qlora"])
def test_a_method_is_saved_loaded_and_taken_out(name, family, tmp_path):
    if name == "bitfit" and family in NO_BIASES:
        with pytest.raises(UsageError, match="has none"):
            peft.apply(base(family), peft.METHODS[name]())
        return
    model = base(family)
    bare = logits(model)
    peft.apply(model, peft.METHODS[name]())
    if name in ("full", "lora", "dora", "parallel-adapter", "ia3", "bitfit", "last-layers"):
        assert gap(logits(model), bare) < 1e-6
    trained = logits(stirred(model))
    assert gap(trained, bare) > 1e-4
    peft.save_adapter(model, tmp_path)
    again = peft.load_adapter(base(family), tmp_path)
    assert gap(logits(again), trained) < 2e-5
    assert gap(logits(peft.unload(again)), bare) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mistral"])
@pytest.mark.parametrize("name", ["prompt", "prefix", "lora", "houlsby"])
def test_a_cache_changes_nothing(name, family):
    model = stirred(peft.apply(base(family), peft.METHODS[name]()))
    tokens = mx.array([[5, 9, 3, 17, 8, 4, 11]])
    cache = model.make_cache()
    parts = [model(tokens[:, :3], cache=cache), model(tokens[:, 3:4], cache=cache), model(tokens[:, 4:], cache=cache)]
    assert cache.length == 7
    assert gap(mx.concatenate(parts, axis=1), model(tokens)) < 2e-5
    cache.trim(2)
    assert gap(model(tokens[:, 2:], cache=cache), model(tokens)[:, 2:]) < 2e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "phi3"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_packed_documents_each_see_the_virtual_tokens(name, family):
    model = stirred(peft.apply(base(family), peft.METHODS[name](num_tokens=4)))
    model.eval()
    first, second = mx.array([[5, 9, 3]]), mx.array([[7, 2, 8, 6, 4]])
    packed = model(
        mx.concatenate([first, second], axis=1),
        positions=mx.array([[0, 1, 2, 0, 1, 2, 3, 4]]),
        segments=mx.array([[0] * 3 + [1] * 5]),
    )
    assert gap(packed, mx.concatenate([model(first), model(second)], axis=1)) < 2e-5


@pytest.mark.parametrize("name", ["prompt", "prefix", "p-tuning", "lora", "dora", "pfeiffer"])
def test_gradients_are_those_of_recomputed_layers(name):
    model = stirred(peft.apply(base("t5"), peft.METHODS[name]()))

    def gradients():
        loss = lambda parameters: (model.update(parameters), logits(model).square().mean())[1]  # noqa: E731
        return dict(tree_flatten(mx.grad(loss)(model.trainable_parameters())))

    kept = gradients()
    model.recompute_layers(9)
    for key, array in gradients().items():
        assert gap(array, kept[key]) < 1e-5
    assert max(float(mx.abs(array).max()) for array in kept.values()) > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5"])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "full"])
def test_merged_weights_answer_as_the_adapter(name, family, tmp_path):
    model = stirred(peft.apply(base(family), peft.METHODS[name]()))
    trained = logits(model)
    peft.merge(model)
    assert gap(logits(model), trained) < 2e-5
    mlxlm.save(model, None, tmp_path)
    assert gap(logits(load_model(tmp_path)), trained) < 2e-5


def test_several_adapters_are_switched_and_weighted():
    model = base("llama")
    bare = logits(model)
    one = logits(stirred(peft.apply(model, peft.Lora(), name="one")))
    two = logits(stirred(peft.apply(model, peft.Ia3(), name="two")))
    peft.activate(model, "one")
    assert gap(logits(model), one) == 0
    peft.activate(model, {"two": 1.0})
    assert gap(logits(model), two) == 0
    peft.activate(model, {"one": 0.5, "two": 0.25})
    half = logits(model)
    assert min(gap(half, other) for other in (bare, one, two)) > 1e-4
    peft.merge(model)
    assert gap(logits(model), half) < 2e-5


@pytest.mark.parametrize("name", ["lora", "dora", "full", "bitfit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_mlx_lm_folder_says_the_same(name, family, tmp_path):
    model = stirred(peft.apply(base(family), peft.METHODS[name]()))
    peft.save_adapter(model, tmp_path, layout="mlx")
    assert gap(logits(peft.load_adapter(base(family), tmp_path)), logits(model)) < 2e-5


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (peft.Lora(targets=("q_prj",)), "did you mean 'q_proj'"),
        (peft.Qlora(), "quantized"),
        (peft.PromptTuning(init="text", text="hello"), "tokenizer"),
        (peft.LastLayers(num_layers=5), "2 layers"),
        (peft.Lora(modules_to_save=("haed",)), "haed"),
    ],
    ids=["target", "quantized", "text", "layers", "saved"],
)
def test_settings_that_do_not_fit_are_told(method, message):
    with pytest.raises(MlxlmError, match=message):
        peft.apply(base("llama"), method)


def test_a_foreign_setting_that_changes_the_maths_is_named(tmp_path):
    import json

    peft.save_adapter(peft.apply(base("llama"), peft.Lora()), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_bias": True}))
    with pytest.raises(ConfigError, match="lora_bias"):
        peft.load_adapter(base("llama"), tmp_path)
