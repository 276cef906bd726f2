"""PaLM has no checkpoints to compare with: it is held against a forward pass written from the paper in numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlm.models import Transformer, family, load_model, save

CONFIG = {
    "architectures": ["PalmForCausalLM"],
    "model_type": "palm",
    "vocab_size": 59,
    "hidden_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 10,
    "intermediate_size": 44,
    "rope_theta": 600.0,
    "layer_norm_eps": 1e-3,
    "max_position_embeddings": 64,
}
TOLERANCE = 1e-5


@pytest.fixture
def model():
    mx.random.seed(3)
    made = Transformer(family("palm").read_config(CONFIG))
    made.apply(lambda array: array + 0.2 * mx.random.normal(array.shape))
    return made.eval()


def norm(x, weight):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG["layer_norm_eps"]) * weight


def turned(x):
    """Feature i of a head (L, heads, 10) pairs with i + 5 and turns by position / theta^(i/5), as complex numbers."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * CONFIG["rope_theta"] ** -(np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def logits_by_the_paper(weights, tokens):
    """y = x + MLP(norm(x)) + Attention(norm(x)): one key and value head, SwiGLU, no biases, logits / sqrt(d)."""
    dim, heads, width = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["head_dim"]
    table = weights["embeddings.token.weight"]
    x, length = table[tokens], len(tokens)
    for n in range(CONFIG["num_hidden_layers"]):
        w = {
            k.removeprefix(f"decoder.layers.{n}."): v
            for k, v in weights.items()
            if k.startswith(f"decoder.layers.{n}.")
        }
        h = norm(x, w["norm.weight"])
        query = turned((h @ w["attention.query.weight"].T).reshape(length, heads, width))
        key = turned((h @ w["attention.key.weight"].T)[:, None])[:, 0]
        value = h @ w["attention.value.weight"].T
        out = np.zeros((length, heads, width))
        for i in range(length):
            for head in range(heads):
                weight = np.exp(query[i, head] @ key[: i + 1].T / np.sqrt(width))
                out[i, head] = weight / weight.sum() @ value[: i + 1]
        gate, up = h @ w["feed_forward.gate.weight"].T, h @ w["feed_forward.up.weight"].T
        fed = (gate / (1 + np.exp(-gate)) * up) @ w["feed_forward.down.weight"].T
        x = x + fed + out.reshape(length, -1) @ w["attention.output.weight"].T
    return norm(x, weights["decoder.norm.weight"]) @ table.T / np.sqrt(dim)


def test_logits_equal_those_of_the_paper(model):
    weights = {name: np.array(array, dtype=np.float64) for name, array in tree_flatten(model.parameters())}
    tokens = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 13))
    ours = np.array(model(mx.array(tokens)))
    for row in range(2):
        theirs = logits_by_the_paper(weights, tokens[row])
        assert np.abs(ours[row] - theirs).max() < TOLERANCE * np.abs(theirs).max()
        assert (ours[row].argmax(-1) == theirs.argmax(-1)).all()


def test_one_key_and_value_head_serves_all_and_nothing_has_a_bias(model):
    names = dict(tree_flatten(model.parameters()))
    assert names["decoder.layers.0.attention.key.weight"].shape == (10, 28)
    assert not [name for name in names if name.endswith("bias")]
    assert "head.output.weight" not in names


def test_it_saves_loads_and_continues_from_a_cache(model, tmp_path):
    save(model, None, tmp_path, family="palm")
    again = load_model(tmp_path)
    assert again.config == model.config
    tokens = mx.array([[5, 9, 2, 31, 44, 7]])
    whole, cache = model(tokens), again.make_cache()
    parts = [again(tokens[:, :4], cache=cache), again(tokens[:, 4:5], cache=cache), again(tokens[:, 5:], cache=cache)]
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < TOLERANCE
