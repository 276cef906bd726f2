"""What the parity fixtures of decoders don't show: older keys, rarer choices, other layouts, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxlm.errors import CheckpointError, ConfigError, UnsupportedModelError
from mlxlm.layers import LayerNormSpec, NoNormSpec, ParallelBlockSpec
from mlxlm.models import Transformer, family
from mlxlm.models.weights import split_heads, to_canonical, to_hub

FIXTURES = Path(__file__).parent.parent / "fixtures" / "models"
NAMES = ["bloom", "chatglm", "falcon", "gemma", "gemma2", "gemma3", "glm", "glm4", "gpt_bigcode", "gpt_neox", "gptj"]
NAMES += ["mpt", "phi", "phi3"]


def values_of(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


def read(name, **changes):
    """The configuration of a fixture with keys changed; None takes a key away."""
    values = {key: value for key, value in (values_of(name) | changes).items() if value is not None}
    return family(values["model_type"]).read_config(values)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_is_refused(name):
    with pytest.raises(ConfigError, match=r"keys that mlxlm does not know.*frobnicate"):
        read(name, frobnicate=3)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_head_is_refused(name):
    with pytest.raises(UnsupportedModelError, match="'BrandNewForDancing' is not supported; supported here: "):
        read(name, architectures=["BrandNewForDancing"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("falcon", {"num_ln_in_parallel_attn": 2}),
        ("falcon", {"apply_residual_connection_post_layernorm": True}),
        ("mpt", {"no_bias": False}),
        ("mpt", {"norm_type": "rmsnorm"}),
        ("mpt", {"attn_config": {"qk_ln": True}}),
        ("mpt", {"attn_config": {"alibi": False}}),
        ("mpt", {"attn_config": {"prefix_lm": True}}),
        ("chatglm", {"interleaved_qkv": True}),
        ("chatglm", {"quantization_bit": 4}),
        ("chatglm", {"pre_seq_len": 128}),
        ("chatglm", {"multi_query_group_num": 6}),
        ("gemma", {"use_bidirectional_attention": True}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("gptj", {"rotary": False}),
        ("gpt_bigcode", {"add_cross_attention": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_changes_the_maths_and_is_not_implemented_is_refused(name, changes):
    with pytest.raises(UnsupportedModelError):
        read(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("falcon", {"multi_query": False, "num_kv_heads": 1}, "1 key/value heads need new_decoder_architecture"),
        ("mpt", {"logit_scale": "big"}, "logit_scale = 'big', expected a number or 'inv_sqrt_d_model'"),
        ("mpt", {"attn_config": {"new": 1}}, "keys that mlxlm does not know"),
        ("gemma2", {"layer_types": ["full_attention"]}, "expected 2 of 'full_attention' or 'sliding_attention'"),
        ("gemma3", {"layer_types": ["full"] * 3}, "expected 3 of 'full_attention' or 'sliding_attention'"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "expected one entry each for full_attention and"),
        ("gemma3", {"rope_local_base_freq": 5.0}, "contradicts itself: rope_theta is 5.0 in one place and 300.0"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_values_that_do_not_fit_are_named(name, changes, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        read(name, **changes)


def test_older_names_of_keys_mean_the_same():
    older = {"n_head": 5, "n_layer": 2, "num_attention_heads": None, "num_hidden_layers": None}
    assert read("falcon", **older) == read("falcon")
    assert read("bloom", n_embed=30, hidden_size=None) == read("bloom")
    assert read("bloom", num_attention_heads=5, n_head=None) == read("bloom")
    assert read("gemma", hidden_act="gelu") == read("gemma")
    assert read("gpt_neox-sequential", use_parallel_residual=None) == read("gpt_neox")


def test_a_pattern_stands_in_for_absent_layer_types():
    windows = [layer.attention.window for layer in read("gemma2", layer_types=None, num_hidden_layers=5).stack.layers]
    assert windows == [5, None, 5, None, 5]
    config = read("gemma3", layer_types=None, num_hidden_layers=7, sliding_window_pattern=3)
    assert [layer.attention.window for layer in config.stack.layers] == [5, 5, None, 5, 5, None, 5]
    assert [layer.attention.positions.base for layer in config.stack.layers][1:4] == [300.0, 5e4, 300.0]


def test_a_null_switches_soft_caps_off_and_an_absent_key_does_not():
    values = values_of("gemma2") | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    off = family("gemma2").read_config(values)
    assert (off.head.softcap, off.stack.layers[0].attention.softcap) == (None, None)
    absent = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (absent.head.softcap, absent.stack.layers[0].attention.softcap) == (30.0, 50.0)


def test_logits_may_be_scaled():
    assert read("mpt", logit_scale="inv_sqrt_d_model").head.scale == 30**-0.5
    assert read("mpt", logit_scale=0.25).head.scale == 0.25


VARIANTS = {
    "chatglm-multihead": ("chatglm", {"multi_query_attention": False}),
    "chatglm-layernorm": ("chatglm", {"rmsnorm": False, "post_layer_norm": False, "add_bias_linear": True}),
    "chatglm-tied": ("chatglm", {"tie_word_embeddings": True}),
    "falcon-grouped-one-norm": ("falcon-grouped", {"num_ln_in_parallel_attn": 1}),
    "falcon-sequential-multi-query": ("falcon", {"parallel_attn": False}),
    "falcon-untied": ("falcon", {"tie_word_embeddings": False}),
    "phi-tied": ("phi", {"tie_word_embeddings": True, "qk_layernorm": False}),
    "gpt_neox-without-biases": ("gpt_neox", {"attention_bias": False}),
    "gptj-headless": ("gptj", {"architectures": ["GPTJModel"]}),
    "phi3-headless": ("phi3", {"architectures": ["Phi3Model"]}),
    "gemma3-one-kind": ("gemma3", {"layer_types": ["sliding_attention"] * 3}),
    "gpt_bigcode-unscaled": ("gpt_bigcode", {"scale_attn_weights": False}),
}


@pytest.mark.parametrize("layout", ["hub", "mlx"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_config_of_rarer_choices_go_there_and_back(variant, layout):
    name, changes = VARIANTS[variant]
    config = read(name, **changes)
    home = family(values_of(name)["model_type"])
    rules = home.rules(config, layout)
    parameters = dict(tree_flatten(Transformer(config).parameters()))
    on_disk = to_hub(rules, parameters)
    back = to_canonical(rules, on_disk)
    assert not back.unexpected
    assert set(back.tensors) == set(parameters)
    assert all(mx.array_equal(back.tensors[key], parameters[key]) for key in parameters)
    # With the names at hand, since some configs leave it to the weights whether there is a head.
    assert home.read_config(home.unparse(config), frozenset(on_disk)) == config


def test_rarer_choices_are_what_they_say():
    layernorm = read(*VARIANTS["chatglm-layernorm"][:1], **VARIANTS["chatglm-layernorm"][1])
    assert layernorm.stack.norm == NoNormSpec()
    assert isinstance(layernorm.stack.layers[0].attention_residual.norm_in, LayerNormSpec)
    shared = read(*VARIANTS["falcon-grouped-one-norm"][:1], **VARIANTS["falcon-grouped-one-norm"][1])
    assert isinstance(shared.stack.layers[0], ParallelBlockSpec)
    assert shared.stack.layers[0].feed_forward_norm is None


def test_mlx_names_of_layers_differ_where_mlx_lm_names_them_otherwise():
    for name, expected in (
        ("gpt_neox", "model.h.0.attention.query_key_value.weight"),
        ("gptj", "model.h.0.ln_1.weight"),
    ):
        config = read(name)
        rules = family(values_of(name)["model_type"]).rules(config, "mlx")
        assert expected in to_hub(rules, dict(tree_flatten(Transformer(config).parameters())))


def test_fused_heads_are_cut_by_group():
    # Two groups of two query heads, one key and one value head, each of one row.
    rows = mx.arange(8).reshape(8, 1)
    rule = split_heads("qkv.{p}", ("q.{p}", "k.{p}", "v.{p}"), 2, (2, 1, 1))
    for kind in ("weight", "scales"):
        parts = rule.split(rows, kind)
        assert [part[:, 0].tolist() for part in parts] == [[0, 1, 4, 5], [2, 6], [3, 7]]
        assert mx.array_equal(rule.join(parts, kind), rows)
    assert [part.tolist() for part in rule.split(mx.arange(8), "bias")] == [[0, 1, 4, 5], [2, 6], [3, 7]]
    with pytest.raises(CheckpointError, match="9 outputs don't divide into 2 x 4 heads"):
        rule.split(mx.zeros((9, 1)), "weight")
