"""Write parity fixtures as GGUF files, the way llama.cpp's converter lays them out.

usage: python tools/make_gguf_fixtures.py        (needs the `gguf` package, and tools/make_fixtures.py run before)

Weights come from tests/fixtures/models; the files go to tests/fixtures/gguf, named after the fixture whose logits they
must give. Names of tensors come from llama.cpp's own table, in the `gguf` package. What the converter does to the
numbers is done here once more, independently of the package: rows of queries and keys in pairs for interleaved rotary
positions, norms plus 1, query, key and value of a fused tensor one after another, linear weights (out, in), and the
frequencies of the "llama3" scaling as a tensor.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
# Fixture -> GGUF architecture.
FILES = {
    "llama-tied": "llama",
    "llama-linear": "llama",
    "llama-wavelength": "llama",
    "qwen2-full": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2-gguf": "gemma2",
    "gemma3-gguf": "gemma3",
    "phi-plain": "phi2",
    "phi3": "phi3",
    "phi3-longrope": "phi3",
    "gpt2": "gpt2",
    "gpt_bigcode": "starcoder",
    "gpt_neox-gelu": "gptneox",
    "bloom": "bloom",
    "mpt": "mpt",
    "falcon": "falcon",
    "falcon-grouped": "falcon",
    "glm": "chatglm",
    "chatglm": "chatglm",
    "glm4": "glm4",
    "bert": "bert",
}
ARCHITECTURES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}


def value(config: dict[str, Any], *names: str, default: Any = None) -> Any:
    """The first of these keys that the config has."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + half of each head put side by side."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def regrouped(rows: np.ndarray, groups: int, queries: int) -> np.ndarray:
    """Groups of `queries` query heads, a key and a value head, as all queries, all keys, all values."""
    heads = rows.reshape(groups, queries + 2, -1, *rows.shape[1:])
    parts = heads[:, :-2], heads[:, -2], heads[:, -1]
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])


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


def describe(writer: gguf.GGUFWriter, kind: str, config: dict[str, Any]) -> None:
    """The keys that the converter writes for an architecture."""
    dim = value(config, "hidden_size", "n_embd", "d_model")
    heads = value(config, "num_attention_heads", "n_head", "n_heads")
    head_dim = value(config, "head_dim", "kv_channels", default=dim // heads)
    writer.add_embedding_length(dim)
    writer.add_block_count(value(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers"))
    writer.add_head_count(heads)
    writer.add_feed_forward_length(value(config, "intermediate_size", "n_inner", "ffn_hidden_size", default=4 * dim))
    length = value(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    writer.add_context_length(length or 2048)
    rms = value(config, "rms_norm_eps", "layernorm_epsilon")
    if rms is not None:
        writer.add_layer_norm_rms_eps(rms)
    else:
        writer.add_layer_norm_eps(value(config, "layer_norm_eps", "layer_norm_epsilon"))
    shared = value(config, "num_key_value_heads", "multi_query_group_num", "num_kv_heads")
    if kind == "starcoder" or (kind == "falcon" and not config["new_decoder_architecture"]):
        shared = 1
    if shared is not None:
        writer.add_head_count_kv(shared)
    wide = kind == "chatglm" and head_dim != dim // heads
    if wide or kind in ("llama", "qwen3", "gemma", "gemma2", "gemma3", "glm4"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if kind == "llama":
        writer.add_vocab_size(config["vocab_size"])
    if kind == "bert":
        writer.add_causal_attention(False)
    if kind == "falcon":
        writer.add_tensor_data_layout("jploski")
    if kind == "gptneox":
        writer.add_parallel_residual(config["use_parallel_residual"])
    if kind == "mpt":
        writer.add_max_alibi_bias(config["attn_config"]["alibi_bias_max"])
    if kind in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if kind == "gemma3":
        writer.add_sliding_window_pattern(config["layer_types"].index("full_attention") + 1)
    if kind == "phi3":
        writer.add_sliding_window(config["sliding_window"] or 0)
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    describe_rotary(writer, kind, config, head_dim)


def describe_rotary(writer: gguf.GGUFWriter, kind: str, config: dict[str, Any], head_dim: int) -> None:
    """Keys and tensors of rotary positions."""
    rope = config.get("rope_parameters")
    if kind == "chatglm" and rope is None:
        writer.add_rope_freq_base(10000 * config["rope_ratio"])
        writer.add_rope_dimension_count(head_dim // 2)
    if rope is None:
        return
    if "full_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", factors(rope, head_dim))
    if rope["rope_type"] == "longrope":
        original = config["original_max_position_embeddings"]
        stretch = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))


def converted(kind: str, config: dict[str, Any], name: str, array: np.ndarray) -> np.ndarray:
    """The numbers of one tensor as the converter stores them."""
    heads = value(config, "num_attention_heads", "n_head", "n_heads")
    if kind == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
        return paired(array, heads)
    if kind == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
        return paired(array, config["num_key_value_heads"])
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return np.ascontiguousarray(array.T)
    if kind in ("bloom", "gptneox") and ".query_key_value." in name:
        return regrouped(array, heads, 1)
    if kind == "falcon" and ".query_key_value." in name:
        groups = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
        return regrouped(array, groups, heads // groups)
    return array


def write(name: str, kind: str) -> None:
    """One GGUF file from one fixture."""
    source = FIXTURES / "models" / name
    config = json.loads((source / "config.json").read_text())
    shared = source / "weights-of"
    weights = load_file(
        (FIXTURES / "models" / shared.read_text().strip() if shared.exists() else source) / "model.safetensors"
    )
    target = FIXTURES / "gguf" / f"{name}.gguf"
    writer = gguf.GGUFWriter(target, kind)
    describe(writer, kind, config)
    layers = value(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], layers)
    for key, array in weights.items():
        if kind == "bert" and key.startswith("cls."):
            continue  # the format holds the encoder alone
        plain = key.removeprefix("bert.") if kind == "bert" else key.removeprefix("transformer.")
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        found = found or names.get_name(plain, try_suffixes=(".weight", ".bias"))
        assert found, key
        writer.add_tensor(found, converted(kind, config, key, array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{target.name}: {target.stat().st_size // 1024} KB")


if __name__ == "__main__":
    for fixture, architecture in FILES.items():
        write(fixture, architecture)
