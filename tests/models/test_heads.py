"""Classification heads: pooling, labels, which architecture asks for which, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

import mlxlm
from mlxlm.errors import ConfigError, UnsupportedModelError
from mlxlm.layers import LayerNormSpec, Spec
from mlxlm.models import (
    LanguageModelHeadSpec,
    SequenceHeadSpec,
    SpanHeadSpec,
    TokenHeadSpec,
    TransformSpec,
    family_of,
    load_model,
    pool,
    save,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "layers"))
from finite_differences import assert_module_follows, normal, randomized

LABELS = ("no", "maybe", "yes")


@pytest.fixture
def hidden():
    mx.random.seed(4)
    return mx.random.normal((3, 7, 5))


@pytest.mark.parametrize("lengths", [None, [7, 2, 1]], ids=["whole", "padded"])
def test_pooling_looks_at_valid_tokens_only(hidden, lengths):
    array = np.array(hidden)
    ends = lengths or [7, 7, 7]
    given = None if lengths is None else mx.array(lengths)
    assert np.array_equal(np.array(pool(hidden, "first", given)), array[:, 0])
    assert np.array_equal(np.array(pool(hidden, "last", given)), array[range(3), [end - 1 for end in ends]])
    means = [row[:end].mean(0) for row, end in zip(array, ends, strict=True)]
    assert np.abs(np.array(pool(hidden, "mean", given)) - means).max() < 1e-6


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (SequenceHeadSpec(dim=5, labels=LABELS, pooling="mean"), (3, 3)),
        (TokenHeadSpec(dim=5, labels=LABELS, bias=False), (3, 7, 3)),
        (SpanHeadSpec(dim=5), (3, 7, 2)),
    ],
    ids=["sequence", "tokens", "span"],
)
def test_a_head_is_pooling_transform_and_projection(spec, shape, hidden):
    transform = TransformSpec(dim=5, activation="tanh", norm=LayerNormSpec(dim=5), bias=False)
    for each in (spec, type(spec)(**{**vars(spec), "transform": transform})):
        head = each.build()
        head.eval()
        x = np.array(hidden).mean(1) if isinstance(spec, SequenceHeadSpec) else np.array(hidden)
        if each.transform is not None:
            x = np.tanh(x @ np.array(head.transform.linear.weight).T)
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x @ np.array(head.output.weight).T + (np.array(head.output.bias) if spec.bias else 0)
        assert x.shape == shape
        assert np.abs(np.array(head(hidden)) - x).max() < 1e-5
        assert Spec.from_json(json.loads(json.dumps(each.to_json()))) == each


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_head_and_its_gradients_follow_the_formula(tied):
    """softcap(scale * (norm(gelu(x A + a)) W + b)), of the transform's, the head's and the table's weights."""
    transform = TransformSpec(dim=4, activation="gelu_tanh", norm=LayerNormSpec(dim=4))
    spec = LanguageModelHeadSpec(dim=4, vocab_size=6, tied=tied, bias=True, transform=transform, scale=0.7, softcap=1.3)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.table = spec.build(), nn.Embedding(6, 4)

    def formula(w, x):
        x = x @ w["head.transform.linear.weight"].T + w["head.transform.linear.bias"]
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * w["head.transform.norm.weight"] + w["head.transform.norm.bias"]
        table, bias = ("table.weight", "head.bias") if tied else ("head.output.weight", "head.output.bias")
        return 1.3 * np.tanh(0.7 * (x @ w[table].T + w[bias]) / 1.3)

    module = randomized(Both())
    assert_module_follows(module, lambda m, x: m.head(x, m.table), formula, normal(2, 3, 4))


def test_dropout_acts_in_training_alone(hidden):
    head = SequenceHeadSpec(dim=5, labels=LABELS, pooling="first", dropout=0.5).build()
    head.eval()
    assert mx.array_equal(head(hidden), head(hidden))
    head.train()
    assert not mx.array_equal(head(hidden), head(hidden))


@pytest.mark.parametrize("name", ["bert-sequence", "roberta-sequence", "modernbert-sequence", "llama-sequence"])
def test_labels_are_kept(name, fixture_model, tmp_path):
    model = load_model(fixture_model(name))
    assert model.config.head.labels == LABELS
    save(model, None, tmp_path / "copy")
    values = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert values["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    del model.source
    save(model, None, tmp_path / "anew", family=name.split("-")[0])
    values = json.loads((tmp_path / "anew" / "config.json").read_text())
    assert values["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    assert values["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    assert values["architectures"][0].endswith("ForSequenceClassification")


def config_of(fixture_model, name, **changes):
    values = json.loads((fixture_model(name) / "config.json").read_text())
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    return family_of(values).read_config(values)


def test_labels_without_names_are_numbered(fixture_model):
    config = config_of(fixture_model, "bert-sequence", id2label=None, label2id=None)
    assert config.head.labels == ("LABEL_0", "LABEL_1")


def test_labels_are_ordered_by_number(fixture_model):
    names = {str(number): f"L{number}" for number in reversed(range(11))}
    config = config_of(fixture_model, "bert-tokens", id2label=names)
    assert config.head.labels == tuple(f"L{number}" for number in range(11))


def test_labels_with_gaps_are_refused(fixture_model):
    with pytest.raises(ConfigError, match=r"numbers \[0, 2\], expected 0 to 1"):
        config_of(fixture_model, "bert-sequence", id2label={"0": "a", "2": "b"})


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("bert", "BertForMultipleChoice"),
        ("roberta", "RobertaForCausalLM"),
        ("modernbert", "ModernBertForMultipleChoice"),
        ("llama", "LlamaForDancing"),
        ("gpt2", "GPT2DoubleHeadsModel"),
        ("t5", "T5ForMultipleChoice"),
        ("umt5", "T5ForQuestionAnswering"),
        ("phi3", "Phi3ForQuestionAnswering"),
    ],
)
def test_a_head_that_there_is_not_is_refused_by_name(fixture_model, name, architecture):
    with pytest.raises(UnsupportedModelError, match=f"'{architecture}' is not supported; supported here: "):
        config_of(fixture_model, name, architectures=[architecture])


@pytest.mark.parametrize("name", ["bert-sequence", "bert-tokens", "roberta-span", "modernbert-sequence"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_heads_in_16_bits_are_within_their_precision(name, dtype, fixture_model, expected_of):
    expected = expected_of(name)
    model = load_model(fixture_model(name), dtype=dtype)
    types = {"token_types": mx.array(expected["token_types"][:1])} if "token_types" in expected else {}
    logits = model(mx.array(expected["tokens"][:1]), **types)
    assert str(logits.dtype) == f"mlx.core.{dtype}"
    error = np.abs(np.array(logits.astype(mx.float32)) - expected["logits"][:1]).max()
    assert error < {"float16": 0.03, "bfloat16": 0.25}[dtype] * np.abs(expected["logits"]).max()


def test_a_classifier_does_not_generate(tiny, fixture_model):
    model = load_model(fixture_model("llama-sequence"))
    with pytest.raises(UnsupportedModelError, match="a classification head, no language-model head"):
        mlxlm.generate(model, tiny[1], "Hello")
    with pytest.raises(UnsupportedModelError, match="no head"):
        mlxlm.generate(load_model(fixture_model("llama-headless")), tiny[1], "Hello")
