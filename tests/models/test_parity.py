"""Logits equal those of transformers, for every fixture, config dialect, padding, cache and round trip."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlm.models import family_of, load_model, save

FOLDER = Path(__file__).parent.parent / "fixtures" / "models"
FIXTURES = sorted(path.name for path in FOLDER.iterdir())
INPUTS = {name: set(mx.load(str(FOLDER / name / "expected.safetensors"))) for name in FIXTURES}


def config_of(name):
    """The configuration of a fixture, by its config.json alone."""
    values = json.loads((FOLDER / name / "config.json").read_text())
    return family_of(values).read_config(values)


TWO_STACKS = [name for name in FIXTURES if "decoder_tokens" in INPUTS[name]]
DECODERS = [name for name in FIXTURES if config_of(name).encoder is None]
OUTPUTS = ("logits", "hidden", "memory", "pooled", "next_sentence")
TOLERANCE = 1e-4
# The frequencies of these change once the context is longer than what they were made for, 16 tokens or more.
OF_THE_CONTEXT = ("llama-dynamic", "llama-longrope-long", "phi3-longrope")
# Where rotary positions depend on the type of the layer: the older keys of full layers and of those with a window.
OLDER_THETA_OF_LAYER_TYPES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}


def outputs(model, expected, rows=slice(None), length=None):
    """Model outputs by the names that the fixtures use."""
    tokens = mx.array(expected["tokens"][rows, :length])
    keywords = {"key_lengths": mx.array(expected["lengths"][rows])} if length is None else {}
    if "token_types" in expected:
        keywords["token_types"] = mx.array(expected["token_types"][rows, :length])
    result = {}
    if "decoder_tokens" in expected:
        result["memory"] = model.encode(tokens, **keywords)
        keywords["decoder_tokens"] = mx.array(expected["decoder_tokens"][rows])
    hidden = result["hidden"] = model.hidden(tokens, **keywords)
    if model.config.head is not None:
        result["logits"] = model.logits(hidden, keywords.get("key_lengths"))
        assert mx.array_equal(result["logits"], model(tokens, **keywords))
    if model.config.pooler is not None:
        result["pooled"] = model.pooler(hidden)
        if model.config.pooler.next_sentence:
            result["next_sentence"] = model.pooler.next_sentence(result["pooled"])
    return {name: np.array(value) for name, value in result.items()}


def valid(key, expected):
    """How many positions of each row of an output count: a decoder's tokens are never padded."""
    decoded = "decoder_tokens" in expected and key != "memory"
    return [expected["decoder_tokens"].shape[1]] * 2 if decoded else expected["lengths"]


def assert_close(ours, theirs, lengths):
    """Equal within TOLERANCE where tokens are valid; same best word."""
    assert ours.shape == theirs.shape
    for row, length in enumerate(lengths):
        a, b = (x[row, :length] if x.ndim == 3 else x[row] for x in (ours, theirs))
        assert np.abs(a - b).max() < TOLERANCE
        assert (a.argmax(-1) == b.argmax(-1)).all()


@pytest.mark.parametrize("name", FIXTURES)
def test_outputs_equal_transformers(name, fixture_model, expected_of):
    expected = expected_of(name)
    ours = outputs(load_model(fixture_model(name)), expected)
    compared = [key for key in OUTPUTS if key in expected and key in ours]
    assert "hidden" in compared
    assert ("logits" in expected) == ("logits" in ours)
    for key in compared:
        assert_close(ours[key], expected[key], valid(key, expected))


@pytest.mark.parametrize("name", FIXTURES)
def test_a_padded_batch_equals_its_rows_alone(name, fixture_model, expected_of):
    expected = expected_of(name)
    model = load_model(fixture_model(name))
    together = outputs(model, expected)
    key = "logits" if "logits" in together else "hidden"
    for row, length in enumerate(expected["lengths"]):
        # A context length decides between the sets of frequencies, so a shorter row alone may rightly differ.
        if length != expected["tokens"].shape[1] and name in OF_THE_CONTEXT:
            continue
        alone = outputs(model, expected, rows=slice(row, row + 1), length=int(length))[key][0]
        counted = together[key][row, : len(alone)] if alone.ndim == 2 else together[key][row]
        assert np.abs(counted - alone).max() < TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
def test_cached_steps_equal_one_pass(name, fixture_model, expected_of):
    model = load_model(fixture_model(name))
    tokens = mx.array(expected_of(name)["tokens"])
    if name in OF_THE_CONTEXT:
        tokens = tokens[:, :16]  # keys in a cache keep the frequencies of the context they were made in
    whole = model.hidden(tokens)
    cache = model.make_cache()
    parts = [model.hidden(tokens[:, :7], cache=cache), model.hidden(tokens[:, 7:8], cache=cache)]
    parts += [model.hidden(tokens[:, 8:11], cache=cache)]
    parts += [model.hidden(tokens[:, i : i + 1], cache=cache) for i in range(11, tokens.shape[1])]
    assert cache.length == tokens.shape[1]
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < TOLERANCE


@pytest.mark.parametrize("name", TWO_STACKS)
def test_cached_decoder_steps_equal_one_pass(name, fixture_model, expected_of):
    expected = expected_of(name)
    model = load_model(fixture_model(name))
    tokens, lengths = mx.array(expected["decoder_tokens"]), mx.array(expected["lengths"])
    memory = model.encode(mx.array(expected["tokens"]), key_lengths=lengths)
    whole = model.decode(tokens, memory, memory_lengths=lengths)
    cache = model.make_cache()
    ends = [0, 5, 6, *range(8, tokens.shape[1] + 1)]
    parts = [
        # From the second step on the layers have what they need of the memory: its values don't matter any more.
        model.decode(tokens[:, a:b], memory if a == 0 else 0 * memory, memory_lengths=lengths, cache=cache)
        for a, b in itertools.pairwise(ends)
    ]
    assert cache.length == tokens.shape[1]
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in FIXTURES
        if '"rope_theta"' in (Path(__file__).parent.parent / "fixtures" / "models" / n / "config.json").read_text()
    ],
)
def test_the_older_config_dialect_means_the_same(name, fixture_model, expected_of):
    directory, expected = fixture_model(name), expected_of(name)
    values = json.loads((directory / "config.json").read_text())
    rope = values.pop("rope_parameters")
    if "full_attention" in rope:
        theta, local_theta = OLDER_THETA_OF_LAYER_TYPES[values["model_type"]]
        local = rope.pop("sliding_attention")
        assert local.pop("rope_type") == "default"
        values[local_theta] = local.pop("rope_theta")
        assert not local
        rope = rope["full_attention"]
    else:
        theta = "rotary_emb_base" if values["model_type"] == "gpt_neox" else "rope_theta"
    values[theta] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        share = "rotary_pct" if values["model_type"] == "gpt_neox" else "partial_rotary_factor"
        values[share] = rope.pop("partial_rotary_factor")
    values["rope_scaling"] = {"type": rope.pop("rope_type"), **rope} if len(rope) > 1 else None
    values["torch_dtype"] = values.pop("dtype", "float32")
    (directory / "config.json").write_text(json.dumps(values))
    ours = outputs(load_model(directory), expected)
    assert_close(ours["hidden"], expected["hidden"], expected["lengths"])


@pytest.mark.parametrize("name", FIXTURES)
def test_saving_gives_back_the_same_checkpoint(name, fixture_model, tmp_path):
    directory = fixture_model(name)
    model = load_model(directory)
    save(model, None, tmp_path / "copy")
    before, after = mx.load(str(directory / "model.safetensors")), mx.load(str(tmp_path / "copy" / "model.safetensors"))
    assert sorted(before) == sorted(after)
    for key, array in before.items():
        assert array.dtype == after[key].dtype
        assert np.array_equal(np.array(array), np.array(after[key])), key
    assert load_model(tmp_path / "copy").config == model.config


@pytest.mark.parametrize("name", FIXTURES)
def test_a_config_written_anew_reads_back_equal(name, fixture_model):
    model = load_model(fixture_model(name))
    family = model.source.family
    weights = frozenset(mx.load(str(model.source.path / "model.safetensors")))
    assert family.read_config(family.unparse(model.config), weights) == model.config


@pytest.mark.parametrize("name", [name for name in FIXTURES if "-" not in name])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_forward_is_within_its_precision(name, dtype, fixture_model, expected_of):
    expected = expected_of(name)
    model = load_model(fixture_model(name), dtype=dtype)
    assert {str(p.dtype) for _, p in tree_flatten(model.parameters())} == {f"mlx.core.{dtype}"}
    further = {key: mx.array(expected[key][:1]) for key in ("token_types", "decoder_tokens") if key in expected}
    hidden = model.hidden(mx.array(expected["tokens"][:1]), **further)
    assert hidden.dtype == model.logits(hidden).dtype == getattr(mx, dtype)
    error = np.abs(np.array(hidden.astype(mx.float32)) - expected["hidden"][:1]).max()
    # Some 10 to 20 roundings to 2^-11 and 2^-8 of numbers of the size of the largest.
    assert error < {"float16": 0.015, "bfloat16": 0.1}[dtype] * np.abs(expected["hidden"]).max()


def test_a_key_that_mlx_lm_asks_for_is_written_anew_but_not_into_a_config_that_lacks_it(fixture_model, tmp_path):
    directory = fixture_model("gpt2")
    before = json.loads((directory / "config.json").read_text())
    assert "n_ctx" not in before
    model = load_model(directory)
    save(model, None, tmp_path / "copy")
    assert "n_ctx" not in json.loads((tmp_path / "copy" / "config.json").read_text())
    written = model.source.family.unparse(model.config)
    assert written["n_ctx"] == written["n_positions"] == before["n_positions"]
