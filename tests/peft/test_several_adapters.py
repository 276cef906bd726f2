"""Several adapters on one base: added up with weights, switched, taken out one by one; the base's arrays are shared."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import mlxlm
from mlxlm import peft
from mlxlm.errors import MlxlmError, UsageError
from mlxlm.models import load_model
from mlxlm.peft.places import at, base_parameters

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
TOKENS = mx.array(np.random.default_rng(0).integers(3, 40, (2, 9)))


def logits(model):
    return np.array(model(TOKENS, decoder_tokens=TOKENS[:, :5]) if model.config.has_memory else model(TOKENS))


def stirred(model):
    moved = tree_map(lambda array: array + 0.1 * mx.random.normal(array.shape), model.trainable_parameters())
    model.update(moved)
    return model


def with_three(family):
    """A model with two LoRAs, one of them of other places, and an adapter of another kind, all at rest."""
    model = load_model(MODELS / family)
    mx.random.seed(0)
    stirred(peft.apply(model, peft.Lora(rank=2), name="one"))
    stirred(peft.apply(model, peft.Lora(rank=3, alpha=5, targets=("all-linear",)), name="two"))
    stirred(peft.apply(model, peft.Houlsby(reduction=4), name="three"))
    peft.activate(model, None)
    return model


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_arrays_of_the_base_are_the_same_objects_throughout(family):
    model = load_model(MODELS / family)
    before, bare = dict(tree_flatten(model.parameters())), logits(model)
    for name in ("one", "two"):
        peft.apply(model, peft.Lora(rank=2), name=name)
    for names in ("one", {"one": 0.5, "two": 2.0}, None):
        peft.activate(model, names)
        assert all(array is before[key] for key, array in base_parameters(model).items())
    assert base_parameters(model).keys() == before.keys()
    peft.unload(model)
    assert {key: id(array) for key, array in tree_flatten(model.parameters())} == {
        key: id(array) for key, array in before.items()
    }
    assert np.array_equal(logits(model), bare)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_weighted_sum_of_loras_is_that_of_their_matrices(family):
    """W + 0.25 s1 B1 A1 - 1.5 s2 B2 A2, made by hand, gives the same logits."""
    model = with_three(family)
    weights = {"one": 0.25, "two": -1.5}
    peft.activate(model, weights)
    together = logits(model)
    by_hand = load_model(MODELS / family)
    for name, weight in weights.items():
        for path, part in peft.content_of(model, name).content.parts.items():
            a, b = (np.array(array, dtype=np.float64) for array in (part.lora_a, part.lora_b))
            linear = at(by_hand, path)
            change = weight * part.scale * b @ a
            linear.weight = mx.array((np.array(linear.weight, dtype=np.float64) + change).astype(np.float32))
    assert np.abs(together - logits(by_hand)).max() < 2e-5 * max(1, np.abs(together).max())
    assert np.abs(together - logits(load_model(MODELS / family))).max() > 1e-2


def test_one_is_unloaded_and_the_others_stay_as_they_were():
    model = with_three("llama")
    expected = {}
    for name in ("one", "two", "three"):
        peft.activate(model, name)
        expected[name] = logits(model)
    peft.activate(model, {"one": 1.0, "two": 1.0})
    peft.unload(model, "two")
    assert np.array_equal(logits(model), expected["one"])  # what was active and is left stays active
    peft.activate(model, "three")
    assert np.array_equal(logits(model), expected["three"])
    with pytest.raises(UsageError, match="no adapter 'two'"):
        peft.activate(model, "two")
    peft.unload(model, "one")
    peft.unload(model, "three")
    assert np.array_equal(logits(model), logits(load_model(MODELS / "llama")))
    assert not any("adapters" in key for key, _ in tree_flatten(model.parameters()))


def test_heads_of_several_adapters_are_weighted_and_given_back():
    model = load_model(MODELS / "bert-sequence")
    head = np.array(model.head.output.weight)
    heads = {}
    for name in ("one", "two"):
        mx.random.seed(len(name) + ord(name[0]))
        stirred(peft.apply(model, peft.Lora(rank=2, modules_to_save=("head",)), name=name))
        heads[name] = np.array(model.head.output.weight)
    peft.activate(model, "one")
    assert np.array_equal(np.array(model.head.output.weight), heads["one"])
    peft.activate(model, {"one": 0.5, "two": 0.25})
    expected = head + 0.5 * (heads["one"] - head) + 0.25 * (heads["two"] - head)
    assert np.abs(np.array(model.head.output.weight) - expected).max() < 1e-6
    peft.activate(model, None)
    assert np.array_equal(np.array(model.head.output.weight), head)


def two_folders(directory, folder):
    """Two adapters of a model, written; their paths and the logits of half of one and twice the other."""
    model, _ = mlxlm.load(directory)
    paths = [folder / "a" / "adapter", folder / "b" / "adapter"]  # of one name, which both want
    for seed, path in enumerate(paths):
        mx.random.seed(seed)
        stirred(peft.apply(model, peft.Lora(rank=2), name=f"n{seed}"))
        peft.save_adapter(model, path, name=f"n{seed}")
    peft.activate(model, {"n0": 0.5, "n1": 2.0})
    return paths, logits(model)


def test_several_folders_are_loaded_with_weights(tiny_directory, tmp_path):
    (one, two), expected = two_folders(tiny_directory, tmp_path)
    model, _ = mlxlm.load(tiny_directory, adapter={one: 0.5, str(two): 2.0})
    assert np.abs(logits(model) - expected).max() < 1e-5
    assert list(model.adapters.known) == ["adapter", "adapter-2"]
    alone, _ = mlxlm.load(tiny_directory, adapter={one: 1.0})
    assert np.abs(logits(alone) - logits(mlxlm.load(tiny_directory, adapter=one)[0])).max() == 0


def test_virtual_tokens_of_two_adapters_are_refused():
    model = load_model(MODELS / "llama")
    for name in ("one", "two"):
        peft.apply(model, peft.PromptTuning(num_tokens=3), name=name)
    for names in ({"one": 1.0, "two": 1.0}, {"one": 0.5}):
        with pytest.raises(UsageError, match="virtual tokens"):
            peft.activate(model, names)


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_the_command_line_takes_several(verb, tiny_directory, tmp_path, monkeypatch, capsys):
    import sys

    from mlxlm.cli import main

    (one, two), _ = two_folders(tiny_directory, tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n')
    rest = {
        "generate": ["--prompt", "hi", "--max-tokens", "8"],
        "evaluate": ["--data", str(tmp_path / "rows.jsonl")],
    }[verb]

    def run(*adapters):
        given = [argument for adapter in adapters for argument in ("--adapter-path", str(adapter))]
        monkeypatch.setattr(sys, "argv", ["mlxlm", verb, "--model", str(tiny_directory), *rest, *given])
        try:
            main.run()
        except SystemExit as stop:
            return stop.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    both, first = run(f"{one}=0.5", f"{two}=2"), run(one)
    assert both[0] == first[0] == 0
    assert both[1].out != first[1].out
    assert run(f"{one}=1")[1].out == first[1].out
    assert run(one, f"{two}=0")[1].out == first[1].out
    for wrong, message in (([f"{one}=much"], "no number"), ([one, f"{one}=2"], "twice"), ([f"{one}=inf"], "finite")):
        status, said = run(*wrong)
        assert (status, said.err.count("\n")) == (2, 1)
        assert message in said.err


@pytest.mark.parametrize("other", ["bert", "t5"])
def test_an_adapter_of_another_model_says_whose_it_is(other, tmp_path):
    peft.save_adapter(peft.apply(load_model(MODELS / "llama"), peft.Lora(rank=2)), tmp_path)
    with pytest.raises(MlxlmError, match=r"adapter_config.json says it was .*llama"):
        peft.load_adapter(load_model(MODELS / other), tmp_path)
