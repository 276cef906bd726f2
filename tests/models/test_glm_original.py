"""The original GLM against a forward pass written in numpy from the paper, and its way of filling blanks."""

from __future__ import annotations

import json

import blank_filler
import mlx.core as mx
import numpy as np
import pytest

import mlxlm
from mlxlm.errors import ConfigError, PromptError, UnsupportedModelError, UsageError
from mlxlm.generation import fill_blanks, fill_mask
from mlxlm.models import load_model, save
from mlxlm.models.families import family_of

CONFIG, WORDS = blank_filler.config(), blank_filler.WORDS
DIM, HEADS, LAYERS = (CONFIG[name] for name in ("hidden_size", "num_attention_heads", "num_layers"))
EPS = CONFIG["layernorm_epsilon"]


@pytest.fixture
def directory(tiny_blank_directory):
    return tiny_blank_directory


def forward(weights, tokens, positions, blocks, prefix):
    """Logits (L, V) of one row: the text up to `prefix` is seen by all, the rest only by what comes later."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)
        return x * weights[f"transformer.{name}.weight"] + weights[f"transformer.{name}.bias"]

    def linear(x, name):
        return x @ weights[f"transformer.{name}.weight"].T + weights[f"transformer.{name}.bias"]

    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    length = len(tokens)
    seen = np.tril(np.ones((length, length), bool))
    seen[:, :prefix] = True
    x = weights["word_embeddings.weight"][tokens]
    x = x + weights["transformer.position_embeddings.weight"][positions]
    x = x + weights["transformer.block_position_embeddings.weight"][blocks]
    for layer in range(LAYERS):
        name = f"layers.{layer}."
        fused = linear(norm(x, name + "input_layernorm"), name + "attention.query_key_value")
        query, key, value = (part.reshape(length, HEADS, -1) for part in np.split(fused, 3, axis=-1))
        scores = np.einsum("ihd,jhd->hij", query, key) / np.sqrt(DIM / HEADS)
        scores = np.where(seen, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", shares, value).reshape(length, DIM)
        x = x + linear(mixed, name + "attention.dense")
        h = linear(norm(x, name + "post_attention_layernorm"), name + "mlp.dense_h_to_4h")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, name + "mlp.dense_4h_to_h")
    return norm(x, "final_layernorm") @ weights["word_embeddings.weight"].T


def infilling(length, spans):
    """Positions and blocks of a text of `length` tokens and of spans (place, number of tokens) that fill it."""
    positions, blocks = list(range(length)), [0] * length
    for place, count in spans:
        positions += [place] * count
        blocks += range(1, count + 1)
    return positions, blocks


def test_logits_equal_the_numpy_forward(directory):
    model = load_model(directory)
    draw = np.random.default_rng(1)
    tokens = draw.integers(0, CONFIG["vocab_size"], (2, 17)).astype(np.int32)
    prefixes = [9, 13]
    layouts = [infilling(9, [(4, 5), (2, 3)]), infilling(13, [(12, 4)])]
    ours = model(
        mx.array(tokens),
        prefix_lengths=mx.array(prefixes),
        positions=mx.array([positions for positions, _ in layouts]),
        blocks=mx.array([blocks for _, blocks in layouts]),
    )
    for row, (positions, blocks) in enumerate(layouts):
        theirs = forward(blank_filler.weights(), tokens[row], positions, blocks, prefixes[row])
        assert np.abs(np.array(ours[row]) - theirs).max() < 1e-4


def test_positions_count_up_and_blocks_are_zero_where_nothing_is_said(directory):
    tokens = np.arange(11, dtype=np.int32)
    theirs = forward(blank_filler.weights(), tokens, *infilling(11, []), 0)
    assert np.abs(np.array(load_model(directory)(mx.array(tokens)[None]))[0] - theirs).max() < 1e-4


def test_cached_steps_equal_one_pass(directory):
    model = load_model(directory)
    tokens = mx.array(np.random.default_rng(2).integers(0, 30, 14))[None]
    positions, blocks = (mx.array([row]) for row in infilling(8, [(5, 4), (3, 2)]))
    whole = model.hidden(tokens, prefix_lengths=mx.array([8]), positions=positions, blocks=blocks)
    cache = model.make_cache()
    parts = [model.hidden(tokens[:, :8], prefix_lengths=mx.array([8]), cache=cache)]
    for i in range(8, 14):
        now = slice(i, i + 1)
        parts.append(model.hidden(tokens[:, now], positions=positions[:, now], blocks=blocks[:, now], cache=cache))
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < 1e-4


def greedy(weights, tokens, places, stops, limit):
    """Fill blank after blank by the numpy forward of everything so far."""
    fills, row, spans = [], list(tokens), []
    for place in places:
        fill, row = [], [*row, WORDS.index("<|startofpiece|>")]
        spans.append([place, 1])
        while len(fill) < limit:
            logits = forward(weights, row, *infilling(len(tokens), spans), len(tokens))[-1, : len(WORDS)]
            if logits.argmax() in stops:
                break
            fill.append(int(logits.argmax()))
            if len(fill) < limit:
                row.append(fill[-1])
                spans[-1][1] += 1
        fills.append(fill)
    return fills


@pytest.mark.parametrize("limit", [1, 6])
def test_blanks_are_filled_as_the_numpy_model_fills_them(directory, limit):
    model, tokenizer = mlxlm.load(directory)
    filled = fill_blanks(model, tokenizer, "ab [MASK] cd [sMASK], ef.[gMASK]", max_tokens=limit)
    names = ["[CLS]", *"ab ", "[MASK]", *" cd ", "[sMASK]", *", ef.", "[gMASK]", "<|endoftext|>"]
    tokens = [WORDS.index(name) for name in names]
    places = [i for i, name in enumerate(names) if name.endswith("MASK]")]
    stops = {WORDS.index("<|endofpiece|>"), WORDS.index("<|endoftext|>")}
    expected = greedy(blank_filler.weights(), tokens, places, stops, limit)
    decoded = [tokenizer.decode(fill) for fill in expected]
    assert any(decoded)
    assert filled.blanks == tuple(text.strip() for text in decoded)
    assert filled.text == f"ab {decoded[0]} cd {decoded[1]}, ef.{decoded[2]}"


def test_names_and_config_survive_a_round_trip(directory, tmp_path):
    model = load_model(directory)
    save(model, None, tmp_path / "copy")
    before, after = (mx.load(str(path / "model.safetensors")) for path in (directory, tmp_path / "copy"))
    assert sorted(before) == sorted(after)
    assert all(np.array_equal(np.array(before[name]), np.array(after[name])) for name in before)
    family = family_of(CONFIG)
    assert family.name == "GLM (original)"
    again = family.unparse(model.config)
    assert family_of(again) is family
    assert family.read_config(again) == model.config


def test_a_wrapped_checkpoint_has_longer_names(directory):
    tensors = {f"glm.{name}": mx.array(array) for name, array in blank_filler.weights().items()}
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["GLMForConditionalGeneration"]}))
    assert load_model(directory)(mx.array([[1, 2, 3]])).shape == (1, 3, CONFIG["vocab_size"])


def test_another_family_has_the_same_model_type():
    assert family_of({"model_type": "glm"}).name != "GLM (original)"


def test_mistakes_are_refused(directory, tiny, tiny_bert):
    model, tokenizer = mlxlm.load(directory)
    with pytest.raises(PromptError, match=r"no blank; put one of \[MASK\], \[sMASK\], \[gMASK\]"):
        fill_blanks(model, tokenizer, "ab")
    with pytest.raises(PromptError, match="empty"):
        fill_blanks(model, tokenizer, "")
    with pytest.raises(PromptError, match="the model's context is 40"):
        fill_blanks(model, tokenizer, "a" * 40 + "[MASK]")
    with pytest.raises(UsageError, match="max_tokens is 0"):
        fill_blanks(model, tokenizer, "[MASK]", max_tokens=0)
    with pytest.raises(UnsupportedModelError, match="use fill-mask"):
        mlxlm.generate(model, tokenizer, "ab")
    with pytest.raises(UnsupportedModelError, match="no masked language model"):
        fill_mask(model, tokenizer, "ab [MASK]")
    with pytest.raises(UnsupportedModelError, match="can't fill blanks"):
        fill_blanks(*tiny_bert, "[MASK]")
    with pytest.raises(UnsupportedModelError, match="can't fill blanks"):
        fill_blanks(*tiny, "[MASK]")
    with pytest.raises(ConfigError, match="hidden_siz"):
        family_of(CONFIG).read_config({**CONFIG, "hidden_siz": 3})
    with pytest.raises(UnsupportedModelError, match="relative_encoding"):
        family_of(CONFIG).read_config({**CONFIG, "relative_encoding": True})
