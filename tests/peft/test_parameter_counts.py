"""Trained parameters are as many as the papers' formulas say, on a decoder, an encoder and an encoder-decoder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlxlm import peft
from mlxlm.errors import UsageError
from mlxlm.models import load_model

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
FAMILIES = ("llama", "bert-sequence", "t5")


class Shape:
    """Sizes of a fixture, from its config.json alone."""

    def __init__(self, family):
        values = json.loads((MODELS / family / "config.json").read_text())
        if family == "t5":
            self.dim, self.inner = values["d_model"], values["d_ff"]
            self.query = self.keys = values["num_heads"] * values["d_kv"]
            self.encoders, self.decoders = values["num_layers"], values["num_decoder_layers"]
            self.attentions = self.encoders + 2 * self.decoders
            self.blocks, self.feed_forward = self.encoders + self.decoders, 2
        else:
            self.dim, self.inner = values["hidden_size"], values["intermediate_size"]
            width = values.get("head_dim") or self.dim // values["num_attention_heads"]
            self.query = values["num_attention_heads"] * width
            self.keys = values.get("num_key_value_heads", values["num_attention_heads"]) * width
            self.attentions = self.blocks = values["num_hidden_layers"]
            self.decoders, self.feed_forward = 0, 3 if family == "llama" else 2
        self.labels = len(values.get("id2label", ()))

    def low_rank(self, rank):
        """Of rank r for the query and value projections: r (in + out) each."""
        return self.attentions * rank * (self.dim + self.query + self.dim + self.keys)

    def low_rank_everywhere(self, rank):
        """For every linear layer of the blocks."""
        attention = 2 * (self.dim + self.query) + 2 * (self.dim + self.keys)
        return rank * (self.attentions * attention + self.blocks * self.feed_forward * (self.dim + self.inner))

    def bottleneck(self, width, places):
        """2 d m + m + d each."""
        return places * (2 * self.dim * width + width + self.dim)


# By name: the method and its paper's formula.
FORMULAS = {
    "lora": (peft.Lora(rank=3), lambda s: s.low_rank(3)),
    "lora-all": (peft.Lora(rank=3, targets=("all-linear",)), lambda s: s.low_rank_everywhere(3)),
    "dora": (peft.Dora(rank=3), lambda s: s.low_rank(3) + s.attentions * (s.query + s.keys)),
    "prompt": (peft.PromptTuning(num_tokens=7), lambda s: 7 * s.dim),
    "prefix": (peft.PrefixTuning(num_tokens=7, projection=False), lambda s: 7 * 2 * s.attentions * s.keys),
    "prefix-mlp": (
        peft.PrefixTuning(num_tokens=7, hidden_dim=5),
        lambda s: 7 * s.keys + s.keys * 5 + 5 + (5 + 1) * 2 * s.attentions * s.keys,
    ),
    "p-tuning": (
        peft.PTuning(num_tokens=7, hidden_dim=5),
        lambda s: 7 * s.dim + s.dim * 5 + 5 + 5 * 5 + 5 + 5 * s.dim + s.dim,
    ),
    "p-tuning-lstm": (
        peft.PTuning(num_tokens=7, hidden_dim=5, encoder="lstm", num_layers=2),
        lambda s: 7 * s.dim + 2 * 4 * (5 * (s.dim + 5 + 1) + 5 * (10 + 5 + 1)) + (10 + 1) * 10 + (10 + 1) * s.dim,
    ),
    # The head of an encoder has a layer before its output; the other two predict words and keep theirs.
    "p-tuning-v2": (
        peft.PTuningV2(num_tokens=7),
        lambda s: 7 * 2 * s.attentions * s.keys + (s.dim * (s.dim + 1) + (s.dim + 1) * s.labels if s.labels else 0),
    ),
    "houlsby": (peft.Houlsby(reduction=6), lambda s: s.bottleneck(s.dim // 6, 2 * s.blocks)),
    "pfeiffer": (peft.Pfeiffer(reduction=6), lambda s: s.bottleneck(s.dim // 6, s.blocks)),
    "parallel": (peft.ParallelAdapter(reduction=2), lambda s: s.bottleneck(s.dim // 2, s.blocks)),
    "ia3": (peft.Ia3(), lambda s: s.attentions * 2 * s.keys + s.blocks * s.inner),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_papers_formula(name, family):
    method, formula = FORMULAS[name]
    counts = peft.count_parameters(peft.apply(load_model(MODELS / family), method))
    assert counts.trainable == formula(Shape(family))
    assert counts.share == counts.trainable / counts.total


@pytest.mark.parametrize("method", [peft.Houlsby, peft.Pfeiffer, peft.ParallelAdapter])
def test_adapters_of_cross_attention_come_on_top(method):
    shape = Shape("t5")
    with_cross, without = (
        peft.count_parameters(peft.apply(load_model(MODELS / "t5"), method(reduction=4, cross_attention=cross)))
        for cross in (True, False)
    )
    assert with_cross.trainable - without.trainable == shape.bottleneck(shape.dim // 4, shape.decoders)


def on_disk(family):
    """Sizes of the tensors of a checkpoint by name."""
    return {key: array.size for key, array in mx.load(str(MODELS / family / "model.safetensors")).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_methods_train_what_the_checkpoint_calls_so(family):
    sizes = on_disk(family)
    model = load_model(MODELS / family)
    total = peft.count_parameters(model).total
    assert total == sum(sizes.values())
    assert peft.count_parameters(peft.apply(model, peft.Full())).trainable == total
    biases = sum(size for key, size in sizes.items() if key.endswith(".bias"))
    if biases:
        model = peft.apply(load_model(MODELS / family), peft.BitFit())
        assert peft.count_parameters(model).trainable == biases
    else:
        with pytest.raises(UsageError, match="has none"):
            peft.apply(load_model(MODELS / family), peft.BitFit())
    last, after = {
        "llama": ("model.layers.1.", ("model.norm.", "lm_head.")),
        "bert-sequence": ("bert.encoder.layer.1.", ("bert.pooler.", "classifier.")),
        "t5": ("decoder.block.2.", ("decoder.final_layer_norm.", "lm_head.")),
    }[family]
    expected = sum(size for key, size in sizes.items() if key.startswith((last, *after)))
    model = peft.apply(load_model(MODELS / family), peft.LastLayers(num_layers=1))
    assert peft.count_parameters(model).trainable == expected


def test_quantized_weights_count_as_the_numbers_they_stand_for():
    from test_adapter_training import CONFIGS, small

    shape = CONFIGS["decoder"]
    dense, quantized = small("decoder"), small("decoder")
    nn.quantize(quantized, group_size=32, bits=4)
    assert peft.count_parameters(quantized).total == peft.count_parameters(dense).total
    peft.apply(dense, peft.Lora(rank=2, targets=("all-linear",)))
    peft.apply(quantized, peft.Qlora(rank=2))
    assert peft.count_parameters(quantized).trainable == peft.count_parameters(dense).trainable
    d, layers = shape["n_embd"], shape["n_layer"]
    assert peft.count_parameters(quantized).trainable == 2 * layers * (4 * (d + d) + 2 * (d + 4 * d))


def logits(model):
    tokens = mx.array(np.random.default_rng(0).integers(3, 40, (2, 9)))
    return np.array(model(tokens, decoder_tokens=tokens[:, :5]) if model.config.has_memory else model(tokens))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "bound"),
    [
        (peft.Lora(targets=("all-linear",), rank_stabilized=True), 1e-6),
        (peft.Dora(targets=("all-linear",)), 2e-6),
        (peft.Ia3(), 1e-6),
        (peft.ParallelAdapter(), 1e-6),
        # N(0, 0.02) of both layers: nearly the identity (Houlsby et al. 2019, section 2).
        (peft.Houlsby(reduction=2), 0.02),
        (peft.Pfeiffer(reduction=2), 0.02),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_fresh_method_leaves_the_logits_where_its_paper_says_so(method, bound, family):
    model = load_model(MODELS / family)
    bare = logits(model)
    mx.random.seed(0)
    peft.apply(model, method)
    change = np.abs(logits(model) - bare).max() / np.abs(bare).max()
    assert change < bound
    if bound > 1e-3:
        assert change > 0


@pytest.mark.parametrize("quantized", [False, True])
def test_fresh_low_rank_changes_of_tables_and_quantized_weights_are_none(quantized):
    from test_adapter_training import small

    model = small("decoder")
    if quantized:
        nn.quantize(model, group_size=32, bits=8)
    tokens = mx.array([[5, 9, 3, 17, 8]])
    bare = np.array(model(tokens))
    methods = [peft.Lora(targets=("token", "query")), peft.Dora(targets=("token", "value"))]
    methods += [peft.Qlora()] if quantized else []
    for method in methods:
        peft.apply(model, method)
        assert np.abs(np.array(model(tokens)) - bare).max() < 2e-5 * np.abs(bare).max()
        peft.unload(model)
    peft.apply(model, peft.Dora(rank=2, targets=("token",)))
    rows, dim = 40, 32
    assert peft.count_parameters(model).trainable == 2 * (rows + dim) + dim


def test_dora_of_a_table_is_its_formula():
    """m / ||W + s A^T B^T||, by column, times the changed rows; merged into the table it says the same."""
    mx.random.seed(2)
    model = load_model(MODELS / "llama")  # its output is another table
    peft.apply(model, peft.Dora(rank=3, alpha=5, targets=("token",)))
    part = peft.content_of(model).content.parts["embeddings.token"]
    part.lora_a, part.lora_b = mx.random.normal(part.lora_a.shape), mx.random.normal(part.lora_b.shape)
    part.magnitude = part.magnitude * mx.random.uniform(0.5, 2, part.magnitude.shape)
    a, b, m, table = (
        np.array(array, dtype=np.float64)
        for array in (part.lora_a, part.lora_b, part.magnitude, model.embeddings.token.base.weight)
    )
    changed = table + 5 / 3 * (b @ a).T
    expected = changed * (m / np.sqrt((changed**2).sum(0)))
    ids = mx.array([[3, 0, 66, 3]])
    assert np.abs(np.array(model.embeddings.token(ids)) - expected[np.array(ids)]).max() < 1e-5
    before = logits(model)
    peft.merge(model)
    assert np.abs(np.array(model.embeddings.token.weight) - expected).max() < 1e-5
    assert np.abs(logits(model) - before).max() < 1e-5 * max(1, np.abs(before).max())
    assert math.isfinite(before.sum())
