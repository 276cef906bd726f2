"""Configs in the wild differ from the usual: each variant means what it says, or is one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlm.errors import ConfigError, UnsupportedModelError
from mlxlm.models import Transformer, family_of, load_model
from mlxlm.models.weights import rename, tied_copy, to_canonical, to_hub

FOLDER = Path(__file__).parent.parent / "fixtures" / "models"
ABSENT = object()


def read(name, **changes):
    values = {**json.loads((FOLDER / name / "config.json").read_text()), **changes}
    values = {key: value for key, value in values.items() if value is not ABSENT}
    return family_of(values).read_config(values)


def windows(config):
    return [layer.attention.window for layer in config.stack.layers]


PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}}
REFUSED = [
    ("llama", PARTIAL, "partial_rotary_factor = 0.5, but models of this family rotate whole heads"),
    ("qwen3", PARTIAL, "rotate whole heads"),
    ("falcon", PARTIAL, "rotate whole heads"),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": "relu"}, "contradicts itself: hidden_activation is 'relu'"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma3", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping = 2.0"),
    ("falcon", {"parallel_attn": False, "new_decoder_architecture": True}, "needs parallel_attn"),
    ("falcon", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "needs new_decoder_architecture"),
    ("bloom", {"n_inner": 44}, "n_inner = 44"),
    ("mpt", {"attn_config": {"alibi": False}}, "alibi = False"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln = True"),
    ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix_lm = True"),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type = 'multiquery_attention'"),
    ("mpt", {"attn_config": {"kv_n_heads": 2}}, "kv_n_heads"),
    ("mpt", {"no_bias": False}, "no_bias = False"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
    ("bert", {"is_decoder": True}, "is_decoder = True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("chatglm", {"interleaved_qkv": True}, "interleaved_qkv = True"),
    ("chatglm", {"original_rope": False}, "original_rope = False"),
    ("chatglm", {"pre_seq_len": 128}, "pre_seq_len = 128"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=[f"{n}-{next(iter(c))}" for n, c, _ in REFUSED])
def test_what_would_compute_something_else_is_refused(name, changes, message):
    with pytest.raises((ConfigError, UnsupportedModelError), match=message.replace("(", r"\(")):
        read(name, **changes)


def test_windows_of_layers():
    assert windows(read("mistral", sliding_window=None)) == [None, None]
    assert windows(read("mistral", sliding_window=ABSENT)) == [4096, 4096]
    sliding = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ABSENT}
    assert windows(read("qwen2", **sliding, max_window_layers=0)) == [4, 4]
    assert windows(read("qwen2", **sliding, max_window_layers=1)) == [None, 4]
    assert windows(read("qwen2", **sliding, max_window_layers=9)) == [None, None]
    assert windows(read("qwen2", **sliding | {"use_sliding_window": False}, max_window_layers=0)) == [None, None]
    assert windows(read("phi3", sliding_window=None)) == [None, None]


def test_scaling_of_rotary_positions_is_for_layers_without_a_window():
    kinds = {layer.attention.window: layer.attention.positions.scaling for layer in read("gemma3").stack.layers}
    assert type(kinds[None]).kind() == "LinearScaling"
    assert type(kinds[5]).kind() == "NoScaling"


def test_absent_sizes_follow_from_the_others():
    assert read("gpt2", n_inner=None).stack.layers[0].feed_forward.hidden_dim == 4 * 30
    assert read("bloom", n_inner=None) == read("bloom")
    assert read("llama", head_dim=None).stack.layers[0].attention.head_dim == 6
    assert read("llama", num_key_value_heads=None).stack.layers[0].attention.num_kv_heads == 6
    assert read("falcon", ffn_hidden_size=None).stack.layers[0].feed_forward.hidden_dim == 4 * 40


def test_scores_scaled_by_layer_need_a_second_layer_to_show():
    config = read("gpt2", n_layer=1, scale_attn_by_inverse_layer_idx=True)
    assert config == read("gpt2", n_layer=1)
    scales = [one.attention.scale for one in read("gpt2", scale_attn_by_inverse_layer_idx=True).stack.layers]
    assert scales == [None, pytest.approx(6**-0.5 / 2)]
    unscaled = {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
    assert [one.attention.scale for one in read("gpt2", **unscaled).stack.layers] == [1.0, 0.5]
    assert read("gpt2", reorder_and_upcast_attn=True) == read("gpt2")


def test_attention_is_dropped_out_at_its_own_rate_where_parts_follow_each_other():
    block = read("falcon-sequential", attention_dropout=0.2, hidden_dropout=0.3).stack.layers[0]
    assert (block.attention_residual.dropout, block.feed_forward_residual.dropout) == (0.2, 0.3)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("tied", [True, False])
def test_of_two_stored_biases_the_one_in_use_counts(name, tied, fixture_model):
    directory = fixture_model(name)
    lead = "cls.predictions." if name == "bert" else "lm_head."
    tensors = {key: mx.array(np.array(x)) for key, x in mx.load(str(directory / "model.safetensors")).items()}
    outer = tensors[f"{lead}bias"]
    tensors[f"{lead}decoder.bias"] = outer + 1
    tensors[f"{lead}decoder.weight"] = tensors[f"{name}.embeddings.word_embeddings.weight"] * (1 if tied else 2)
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "pt"})
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": tied}))
    model = load_model(directory)
    bias = model.head.bias if tied else model.head.output.bias
    assert mx.array_equal(bias, outer if tied else outer + 1)


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_of_several_names_on_disk_the_first_of_the_rule_counts(order):
    rules = (rename(("first", "second"), "one"), tied_copy("third", "one"))
    tensors = {name: mx.array([1.0 if name == "first" else 2.0]) for name in order}
    found = to_canonical(rules, tensors)
    assert found.tensors["one"].item() == 1.0
    assert found.origins == {"one": "first"}


@pytest.mark.parametrize("name", ["chatglm", "glm", "glm4"])
def test_rarer_switches_change_what_they_name(name):
    """Each switch changes one thing, and goes to config.json and back."""
    switches = {
        "chatglm": [{"post_layer_norm": False}, {"rmsnorm": False}, {"add_qkv_bias": False}, {"add_bias_linear": True},
                    {"apply_residual_connection_post_layernorm": True}, {"rope_ratio": 500}],
        "glm": [{"attention_bias": False}, {"tie_word_embeddings": True}],
        "glm4": [{"attention_bias": False}, {"tie_word_embeddings": True}],
    }[name]  # fmt: skip
    usual = read(name)
    seen = {usual}
    for changes in switches:
        config = read(name, **changes)
        assert config not in seen, changes
        seen.add(config)
        family = family_of({"model_type": name})
        parameters = dict(tree_flatten(Transformer(config).parameters()))
        assert ("decoder.norm.weight" in parameters) == (changes != {"post_layer_norm": False})
        on_disk = frozenset(to_hub(family.rules(config, "hub"), parameters))
        assert family.read_config(family.unparse(config), on_disk) == config
