"""Adapters of classifiers on a base that is none: the head comes with the adapter, labels and all."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_map

import mlxlm
from mlxlm import peft
from mlxlm.errors import ConfigError, ModelNotFoundError, WeightsError
from mlxlm.models import Transformer, family_of, load_model, with_classification_head

TOKENS = mx.array([[5, 9, 13, 7], [8, 21, 3, 3]])
LABELS = ("bad", "good", "fine")


def classifier_with(path, folder, method, kind="sequence"):
    """Save the adapter of a classifier on the model of a path; the classifier's logits."""
    mx.random.seed(2)
    model = with_classification_head(load_model(path), kind, LABELS)
    peft.apply(model, method)
    model.update(tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), model.trainable_parameters()))
    peft.save_adapter(model, folder)
    return np.array(model(TOKENS))


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
@pytest.mark.parametrize("name", ["lora", "ia3", "p-tuning-v2", "houlsby", "bitfit"])
@pytest.mark.parametrize("base", ["tiny_directory", "tiny_bert_directory"])
def test_the_adapter_brings_head_and_labels_to_its_base(base, name, kind, request, tmp_path):
    path = request.getfixturevalue(base)
    if name == "bitfit" and base == "tiny_directory":
        pytest.skip("this model has no biases")
    method = peft.METHODS[name](modules_to_save=("head",))
    expected = classifier_with(path, tmp_path / "adapter", method, kind)
    model, _ = mlxlm.load(path, adapter=tmp_path / "adapter")
    assert np.abs(np.array(model(TOKENS)) - expected).max() < 1e-5
    assert model.config.head.labels == LABELS


def test_without_names_labels_are_numbered_as_the_head_has_them(tiny_directory, tmp_path):
    expected = classifier_with(tiny_directory, tmp_path / "adapter", peft.Lora(modules_to_save=("head",)))
    (tmp_path / "adapter" / "labels.json").unlink()
    model, _ = mlxlm.load(tiny_directory, adapter=tmp_path / "adapter")
    assert model.config.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert np.abs(np.array(model(TOKENS)) - expected).max() < 1e-5


def test_an_adapter_without_the_head_that_its_task_needs_is_refused(tiny_directory, tmp_path):
    classifier_with(tiny_directory, tmp_path / "adapter", peft.Lora())
    (tmp_path / "adapter" / "labels.json").unlink()
    with pytest.raises(WeightsError, match="no such head"):
        mlxlm.load(tiny_directory, adapter=tmp_path / "adapter")
    (tmp_path / "adapter" / "labels.json").write_text(json.dumps({"task_type": "SEQ_CLS", "id2label": {"1": "a"}}))
    with pytest.raises(ConfigError, match="id2label"):
        mlxlm.load(tiny_directory, adapter=tmp_path / "adapter")


def test_a_folder_with_a_whole_model_says_so(tiny_directory):
    with pytest.raises(ModelNotFoundError, match="give it as the model"):
        mlxlm.load(tiny_directory, adapter=tiny_directory)


def test_a_quantized_body_keeps_its_weights_under_a_new_head(tiny_directory, tmp_path):
    values = json.loads((tiny_directory / "config.json").read_text())
    values |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 4}
    body = Transformer(family_of(values).read_config(values))
    nn.quantize(body, group_size=32, bits=8)
    mlxlm.save(body, None, tmp_path / "body", family="llama")
    model = load_model(tmp_path / "body", quantized=True)
    classifier = with_classification_head(model, "sequence", LABELS)
    assert np.array_equal(np.array(classifier.hidden(TOKENS)), np.array(model.hidden(TOKENS)))
    assert isinstance(classifier.decoder.layers[0].attention.query, nn.QuantizedLinear)
    assert isinstance(classifier.head.output, nn.Linear)
    mlxlm.save(classifier, None, tmp_path / "saved")
    again = load_model(tmp_path / "saved", quantized=True)
    assert np.abs(np.array(again(TOKENS)) - np.array(classifier(TOKENS))).max() < 1e-5
