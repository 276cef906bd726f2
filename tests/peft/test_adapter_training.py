"""Methods in training: what learns, what stays as it is, bit for bit, and that a resumed run is the same run."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

import mlxlm
from mlxlm import peft
from mlxlm.errors import UsageError
from mlxlm.models import Transformer, family_of, load_model
from mlxlm.peft.lora import add_low_rank
from mlxlm.training import Trainer, TrainSettings, WordLoss
from mlxlm.training.initialisation import initialise

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from training_runs import Fixed, Rows, same, tiny_model, weights_of

WORDS = 40
CONFIGS = {
    "decoder": {"model_type": "gpt2", "vocab_size": WORDS, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 32,
                "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "encoder": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": WORDS, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
    },
    "encoder-decoder": {
        "model_type": "t5", "vocab_size": WORDS, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2,
        "num_decoder_layers": 2, "decoder_start_token_id": 0, "feed_forward_proj": "relu",
        "dropout_rate": 0,
    },
}  # fmt: skip


def small(shape):
    """A model of a shape, with drawn weights of a size that lets virtual tokens matter."""
    model = Transformer(family_of(CONFIGS[shape]).read_config(CONFIGS[shape]))
    initialise(model, 1, scale=0.2)
    return model


def batch_for(shape):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, WORDS, (4, 8)).astype(np.int32)
    batch = {"tokens": tokens, "targets": rng.integers(3, 6, (4, 8)).astype(np.int32)}
    if shape == "encoder-decoder":
        batch |= {"decoder_tokens": tokens[:, ::-1].copy()}
    return batch


def settings(**changes):
    return TrainSettings(**{"steps": 10, "learning_rate": 0.01, "schedule": "constant", "compile": False, **changes})


@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize("name", peft.METHODS)
def test_ten_steps_lower_the_loss_and_change_nothing_else(name, shape):
    model, batch = small(shape), batch_for(shape)
    if name == "qlora":
        nn.quantize(model, group_size=32, bits=8)
    if name == "bitfit" and shape == "encoder-decoder":
        with pytest.raises(UsageError, match="has none"):
            peft.apply(model, peft.BitFit())
        return
    mx.random.seed(0)
    peft.apply(model, peft.METHODS[name](**({"num_layers": 1} if name == "last-layers" else {})))
    before, trained = weights_of(model), {key for key, _ in tree_flatten(model.trainable_parameters())}
    rate = 0.1 if name == "prompt" else 0.01  # a few vectors before the input have to move far
    training = Trainer(
        model, WordLoss(), Fixed([batch]), settings(learning_rate=rate), valid=lambda: Fixed([batch], once=True)
    )
    start = training.evaluate().loss
    training.run()
    after = weights_of(model)
    assert training.evaluate().loss < start - 0.005
    assert after.keys() == before.keys()
    changed = {key for key in after if not np.array_equal(after[key], before[key])}
    assert changed
    assert changed <= trained
    if name != "full":  # where tokens that no batch has keep their row, but every table has some that are there
        assert len(changed) > len(trained) / 2


def adapted(seed):
    model = tiny_model()
    mx.random.seed(seed)
    return peft.apply(model, peft.Lora(rank=2, targets=("all-linear",), dropout=0.1))


def test_bug_11_training_an_adapter_touches_nothing_else_of_the_process():
    bystander, tokens = tiny_model(), mx.array([[5, 9, 3, 17, 8]])
    bystander.train()
    mx.random.seed(4)
    expected, weights = np.array(bystander(tokens)), weights_of(bystander)
    trainable = {key for key, _ in tree_flatten(bystander.trainable_parameters())}
    calls = {kind: vars(kind).get("__call__") for kind in {type(module) for module in bystander.modules()}}
    model = adapted(0)
    Trainer(model, WordLoss(), Rows(), settings(recompute_layers=-1)).run()
    mx.random.seed(4)
    assert np.array_equal(np.array(bystander(tokens)), expected)
    assert same(weights_of(bystander), weights)
    assert {key for key, _ in tree_flatten(bystander.trainable_parameters())} == trainable == weights.keys()
    assert all(vars(kind).get("__call__") is call for kind, call in calls.items())
    assert same(weights_of(peft.unload(model)), weights_of(tiny_model()))


def test_a_run_with_an_adapter_is_resumed_exactly(tmp_path):
    whole, halves = adapted(0), adapted(0)
    options = settings(steps=6, accumulation=2, ema_decay=0.9)
    Trainer(whole, WordLoss(), Rows(), options, tmp_path / "whole").run()
    Trainer(halves, WordLoss(), Rows(), options, tmp_path / "halves").run(until=3)
    again = adapted(77)  # drawn otherwise: all that matters must come from the checkpoint
    Trainer(again, WordLoss(), Rows(), options, tmp_path / "halves").run(resume=True)
    assert same(weights_of(again), weights_of(whole))
    assert not same(weights_of(again), weights_of(halves))
    saved = mx.load(str(tmp_path / "whole" / "checkpoints" / "step-00000006" / "parameters.safetensors"))
    assert saved
    assert all(".adapters.default.lora_" in key for key in saved)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bug_7_full_fine_tuning_saves_embeddings_norms_and_head(tied, tmp_path):
    base = tiny_model(tie_word_embeddings=tied)
    mlxlm.save(base, None, tmp_path / "base", family="llama")
    model = peft.apply(load_model(tmp_path / "base"), peft.Full())
    Trainer(model, WordLoss(), Rows(), settings(steps=3)).run()
    peft.save_adapter(model, tmp_path / "adapter")
    mlxlm.save(model, None, tmp_path / "whole")
    before, after = weights_of(base), weights_of(model)
    assert not any(np.array_equal(before[key], after[key]) for key in before)
    assert {"embeddings.token.weight", "decoder.norm.weight"} <= after.keys()
    assert ("head.output.weight" in after) != tied
    assert same(weights_of(load_model(tmp_path / "whole")), after)
    assert same(weights_of(peft.load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")), after)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)], ids=["rows", "batches"])
@pytest.mark.parametrize("form", ["given", "frozen", "frozen with bias"])
def test_a_low_rank_change_and_its_gradients_are_those_of_the_plain_formula(form, shape):
    rng = np.random.default_rng(0)
    drawn = lambda *size: mx.array(rng.normal(size=size).astype(np.float32))  # noqa: E731
    x, y, lora_a, lora_b, weights = drawn(*shape, 7), drawn(*shape, 6), drawn(3, 7), drawn(6, 3), drawn(*shape, 6)
    base = nn.Linear(7, 6, bias=form == "frozen with bias")
    base.freeze()

    def ours(x, y, lora_a, lora_b):
        if form == "given":
            return add_low_rank(x, y, lora_a, lora_b, 0.75)
        return add_low_rank(x, None, lora_a, lora_b, 0.75, base)

    def plain(x, y, lora_a, lora_b):
        return (y if form == "given" else base(x)) + 0.75 * ((x @ lora_a.T) @ lora_b.T)

    results = []
    for function in (ours, plain):
        loss = lambda *given: (function(*given) * weights).sum()  # noqa: B023, E731
        value, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2, 3))(x, y, lora_a, lora_b)
        results.append([value, *gradients])
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert mx.allclose(one, other, rtol=1e-5, atol=1e-5).item()
