"""Write parity fixtures as GGUF files, the way llama.cpp's converter lays them out.

usage: python tools/make_gguf_fixtures.py        (needs the `gguf` package, and tools/make_fixtures.py run before)

Weights come from tests/fixtures/models; the files go to tests/fixtures/gguf, named after the fixture whose logits they
must give. Rows of queries and keys are put in pairs for interleaved rotary positions where the format asks for it, and
the frequencies of the "llama3" scaling become the tensor rope_freqs, as in published files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + half of each head put side by side."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def factors(rope: dict, head_dim: int) -> np.ndarray:
    """What the "llama3" scaling divides each frequency by (Llama 3.1)."""
    result = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wavelength < high:
            result.append(1.0)
        elif wavelength > low:
            result.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            result.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(result, dtype=np.float32)


def write(name: str, architecture: str) -> None:
    """One GGUF file from one fixture."""
    source = FIXTURES / "models" / name
    config = json.loads((source / "config.json").read_text())
    shared = source / "weights-of"
    weights = load_file(
        (FIXTURES / "models" / shared.read_text().strip() if shared.exists() else source) / "model.safetensors"
    )
    rope, head_dim = (
        config["rope_parameters"],
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    target = FIXTURES / "gguf" / f"{name}.gguf"
    target.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", factors(rope, head_dim))
    for key, array in weights.items():
        stem, _, kind = key.rpartition(".")
        layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
        part = stem.split(".", 3)[3] if layer is not None else stem
        if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = "num_attention_heads" if part.endswith("q_proj") else "num_key_value_heads"
            array = paired(array, config[heads])
        writer.add_tensor(("" if layer is None else f"blk.{layer}.") + f"{NAMES[part]}.{kind}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{target.name}: {target.stat().st_size // 1024} KB")


if __name__ == "__main__":
    for fixture, kind in {
        "llama-tied": "llama",
        "llama-linear": "llama",
        "llama-wavelength": "llama",
        "qwen3": "qwen3",
    }.items():
        write(fixture, kind)
