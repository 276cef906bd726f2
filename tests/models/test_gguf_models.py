"""GGUF files give the outputs of the checkpoints that they were made from, and are what a model would be written as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlm.checkpoint import open_gguf
from mlxlm.errors import ConfigError, UnsupportedModelError, UsageError
from mlxlm.generation.embedding import default_pooling
from mlxlm.models import Transformer, family, load_model, loading, save
from mlxlm.models.families import families, gguf_family
from mlxlm.models.gguf_contents import gguf_contents
from mlxlm.models.gguf_dialect import GgufTensors
from mlxlm.models.weights import shift, to_canonical

FILES = sorted((Path(__file__).parent.parent / "fixtures" / "gguf").glob("*.gguf"))
NAMES = [path.stem for path in FILES]
ARCHITECTURES = {path.stem: open_gguf(path).metadata["general.architecture"] for path in FILES}


def file_of(name):
    return FILES[NAMES.index(name)]


def contents(model, home=None):
    return gguf_contents(home or model.source.family, model.config, dict(tree_flatten(model.parameters())))


def assert_equal_where_both_say(ours, theirs, all_of=()):
    """Equal numbers up to float32, in the keys that both have; those of `all_of` must be there."""
    assert set(all_of) <= set(ours)
    for key in set(ours) & set(theirs):
        value = theirs[key]
        assert ours[key] == (value if isinstance(value, (str, bool)) else pytest.approx(value, rel=1e-6)), key


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_transformers(name, expected_of):
    expected, model = expected_of(name), load_model(file_of(name))
    types = {"token_types": mx.array(expected["token_types"][:1])} if "token_types" in expected else {}
    hidden = model.hidden(mx.array(expected["tokens"][:1]), **types)
    ours = np.array(hidden if model.config.head is None else model.logits(hidden))[0]
    theirs = expected["hidden" if model.config.head is None else "logits"][0]
    # Numbers of the header are float32, and the frequencies of the scaled files went through float32 factors.
    assert np.abs(ours - theirs).max() < 2e-4
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def test_every_architecture_that_is_read_has_a_file():
    read = {one.gguf.architecture for one in families() if one.gguf and gguf_family(one.gguf.architecture) is one}
    assert read == set(ARCHITECTURES.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_written_as_the_file_it_came_from(name):
    checkpoint, model = open_gguf(file_of(name)), load_model(file_of(name))
    written, stored = contents(model), checkpoint.load()
    assert "head" in model or model.config.head is None
    spread = ARCHITECTURES[name] == "chatglm" and "blk.0.attn_q.weight" in stored
    if spread:  # two layouts are read, one is written
        for layer in range(2):
            for kind in ("weight", "bias"):
                parts = [stored.pop(f"blk.{layer}.attn_{part}.{kind}") for part in "qkv"]
                stored[f"blk.{layer}.attn_qkv.{kind}"] = mx.concatenate(parts)
    assert sorted(written.tensors) == sorted(stored)
    for key, array in stored.items():
        # The scale of a norm that is stored plus 1 is rounded twice; factors are kept as they are.
        assert np.abs(np.array(written.tensors[key]) - np.array(array)).max() < 1e-6, key
    known = {key: value for key, value in checkpoint.metadata.items() if key.startswith(f"{ARCHITECTURES[name]}.")}
    assert known
    # Where the frequencies are not stretched, nothing depends on the length that they were made for.
    free = set() if "rope_factors_long.weight" in stored else {"phi3.rope.scaling.original_context_length"}
    assert_equal_where_both_say(written.metadata, known, all_of=set(known) - free)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("llama-wavelength", "glm"))])
def test_from_the_hub_to_gguf_and_back(name, fixture_model):
    """The same contents, whichever of the two the model came from."""
    model, other = load_model(fixture_model(name)), load_model(file_of(name))
    if name == "bert":  # the format holds the encoder alone
        config = replace(model.config, head=None, pooler=None)
        parameters = {key: x for key, x in tree_flatten(model.parameters()) if not key.startswith("head.")}
        written = gguf_contents(model.source.family, config, parameters)
    else:
        written = contents(model)
    again = contents(other)
    assert sorted(written.tensors) == sorted(again.tensors)
    assert all(mx.allclose(x, again.tensors[key], atol=1e-6) for key, x in written.tensors.items())
    optional = {f"{ARCHITECTURES[name]}.context_length"} - set(written.metadata)
    assert_equal_where_both_say(written.metadata, again.metadata, all_of=set(again.metadata) - optional)


def test_a_layout_that_is_never_written_is_read_too():
    """Three tensors for query, key and value where one is usual, and one where three are."""
    for name, joined in (("phi-plain", True), ("falcon", False)):
        model = load_model(file_of(name))
        tensors, rules = contents(model).tensors, model.source.family.gguf.rules(model.config)
        attention = model.config.stack.layers[0].attention
        wide, narrow = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        for key in [key for key in tensors if ".attn_q" in key]:
            if joined:
                parts = [tensors.pop(key.replace("attn_q", f"attn_{part}")) for part in "qkv"]
                tensors[key.replace("attn_q", "attn_qkv")] = mx.concatenate(parts)
            else:
                parts = mx.split(tensors.pop(key), [wide, wide + narrow])
                for part, array in zip("qkv", parts, strict=True):
                    tensors[key.replace("attn_qkv", f"attn_{part}")] = array
        back = to_canonical(rules, tensors)
        assert not back.unexpected
        parameters = dict(tree_flatten(model.parameters()))
        assert all(mx.array_equal(parameters[key], array) for key, array in back.tensors.items())
        assert set(back.tensors) == set(parameters)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen2", r"layers\.1\.attention\.window: 5 / None"),
        ("mistral", r"layers\.0\.attention\.window: 5 / None"),
        ("gemma2", r"attention\.scale"),
        ("gpt_neox", r"feed_forward\.activation: gelu_tanh / gelu"),
        ("gpt2-scaled", r"layers\.1\.attention\.scale"),
        ("mpt-clipped", r"attention\.scale: 0\.9 / None"),
        ("bloom-normed-residual", "from_normed: True / False"),
        ("llama-dynamic", r"positions\.scaling: Dynamic"),
        ("llama-proportional", r"positions\.scaling: Proportional"),
        ("llama-headless", "head: None"),
    ],
)
def test_what_the_format_cannot_say_is_refused(name, reason, fixture_model):
    with pytest.raises(UsageError, match=f"can't describe this .*{reason}"):
        contents(load_model(fixture_model(name)))


@pytest.mark.parametrize("name", ["phi", "bert", "llama-sequence", "bert-pooled", "falcon-sequential", "falcon-alibi"])
def test_weights_without_a_place_are_refused(name, fixture_model):
    with pytest.raises((UnsupportedModelError, UsageError), match=r"has no place for|can't describe"):
        contents(load_model(fixture_model(name)))


def test_families_without_an_architecture_are_refused(fixture_model):
    with pytest.raises(UnsupportedModelError, match="no GGUF architecture for models of GPT-J"):
        contents(load_model(fixture_model("gptj")))


def test_scalings_of_rotary_positions_are_described(fixture_model):
    yarn = contents(load_model(fixture_model("llama-yarn"))).metadata
    assert yarn["llama.rope.scaling.type"] == "yarn"
    assert yarn["llama.rope.scaling.original_context_length"] == 16
    long = contents(load_model(fixture_model("llama-longrope-long")))
    assert long.tensors["rope_factors_long.weight"].tolist() == [2.0, 3.0, 4.0, 9.0]


def test_a_bound_on_projections_is_described(fixture_model):
    model = load_model(fixture_model("mpt"))
    layers = tuple(replace(one, attention=replace(one.attention, clip=0.7)) for one in model.config.stack.layers)
    clipped = Transformer(replace(model.config, decoder=replace(model.config.decoder, layers=layers)))
    assert contents(clipped, family("mpt")).metadata["mpt.attention.clamp_kqv"] == 0.7


def test_a_file_becomes_a_directory(tmp_path, expected_of):
    """Norms that GGUF stores plus 1 come back as the hub stores them."""
    save(load_model(file_of("gemma2-gguf")), None, tmp_path / "saved")
    expected = expected_of("gemma2-gguf")
    logits = np.array(load_model(tmp_path / "saved")(mx.array(expected["tokens"][:1])))
    assert np.abs(logits - expected["logits"][:1]).max() < 2e-4


def test_an_offset_keeps_the_digits_of_small_numbers():
    rule = shift("a.{p}", "b.{p}", 1.0)
    scale = mx.array([1e-3, -0.5, 2.0]).astype(mx.bfloat16)
    stored = rule.join((scale,), "weight")
    assert stored.dtype == mx.float32
    assert mx.array_equal(rule.split(stored, "weight")[0].astype(mx.bfloat16), scale)


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(UnsupportedModelError, match=r"'llamma'.*did you mean 'llama'"):
        gguf_family("llamma")


SMALL = {"general.architecture": "llama", "llama.embedding_length": 64, "llama.attention.head_count": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.attention.frobnication": 3}, r"does not know: llama\.attention\.frobnication"),
        ({"llama.attention.head_count_kv": np.array([2, 4])}, "head_count_kv differs between layers"),
        ({"llama.attention.value_length": 8}, "value_length = 8, expected 16"),
        ({"llama.expert_count": 8}, "expert_count = 8, expected 0"),
        ({"llama.rope.scaling.attn_factor": 1.3}, r"attn_factor = 1\.3 is not implemented"),
        ({"llama.embedding_length": None}, r"lacks llama\.embedding_length"),
        ({"llama.attention.head_count": 0}, "something is missing, or of the wrong type or size"),
        ({"llama.embedding_length": "wide"}, "something is missing, or of the wrong type or size"),
    ],
)
def test_metadata_that_cannot_be_meant_are_refused(changes, message):
    metadata = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        gguf_family("llama").gguf.config(metadata, GgufTensors({}, lambda name: []))


def test_one_number_for_every_layer_is_that_number():
    metadata = {**SMALL, "llama.attention.head_count_kv": np.array([2, 2, 2])}
    values = gguf_family("llama").gguf.config(metadata, GgufTensors({}, lambda name: []))
    assert values["num_key_value_heads"] == 2


def test_which_layers_have_a_window_may_be_listed():
    metadata = {"gemma3.embedding_length": 64, "gemma3.attention.head_count": 4, "gemma3.block_count": 3}
    metadata["gemma3.attention.sliding_window_pattern"] = np.array([True, False, True])
    values = family("gemma3_text").gguf.config(metadata, GgufTensors({}, lambda name: []))
    assert values["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(("number", "pooling"), [(0, "mean"), (1, "mean"), (2, "cls"), (3, "last")])
def test_a_file_says_how_texts_become_vectors(number, pooling, tmp_path, monkeypatch):
    checkpoint = open_gguf(file_of("bert"))
    checkpoint.metadata["bert.pooling_type"] = number
    monkeypatch.setattr(loading, "open_gguf", lambda path: checkpoint)
    model = load_model(file_of("bert"))
    assert default_pooling(model) == pooling
    save(model, None, tmp_path / "saved")
    monkeypatch.undo()
    assert default_pooling(load_model(tmp_path / "saved")) == pooling


def test_a_pooling_that_there_is_not_is_refused(monkeypatch):
    checkpoint = open_gguf(file_of("bert"))
    checkpoint.metadata["bert.pooling_type"] = 4
    monkeypatch.setattr(loading, "open_gguf", lambda path: checkpoint)
    with pytest.raises(UnsupportedModelError, match="pooling 'rank'"):
        default_pooling(load_model(file_of("bert")))


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_models_scale_scores_by_the_width_there_is_for_a_head(architecture, layers):
    """llama.cpp goes by the number of layers, since files don't hold the scale."""
    given = {"embedding_length": 64, "attention.head_count": 4, "attention.key_length": 24}
    for count, scalar in ((layers, 16), (26, 24)):
        metadata = {f"{architecture}.{key}": value for key, value in {**given, "block_count": count}.items()}
        values = gguf_family(architecture).gguf.config(metadata, GgufTensors({}, lambda name: []))
        assert values["query_pre_attn_scalar"] == scalar
