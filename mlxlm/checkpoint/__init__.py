"""Weights on disk: safetensors, PyTorch files, GGUF and quantized tensors, found locally or on the Hugging Face hub.

checkpoint = open_checkpoint("path/to/model")     # reads headers only
checkpoint.tensors["lm_head.weight"].shape
arrays = checkpoint.load()                         # lazy arrays by name
"""

from __future__ import annotations

from mlxlm.checkpoint.files import read_json, write_bytes_atomic, write_json_atomic
from mlxlm.checkpoint.gguf import open_gguf
from mlxlm.checkpoint.hub import resolve_model
from mlxlm.checkpoint.opening import open_checkpoint
from mlxlm.checkpoint.packed import unpacked
from mlxlm.checkpoint.quantization import Quantization, QuantizationConfig, dequantize, quantized_modules
from mlxlm.checkpoint.safetensors import open_safetensors
from mlxlm.checkpoint.safetensors_writer import save_safetensors
from mlxlm.checkpoint.tensors import Checkpoint, TensorInfo
from mlxlm.checkpoint.torch_files import open_torch

__all__ = [
    "Checkpoint",
    "Quantization",
    "QuantizationConfig",
    "TensorInfo",
    "dequantize",
    "open_checkpoint",
    "open_gguf",
    "open_safetensors",
    "open_torch",
    "quantized_modules",
    "read_json",
    "resolve_model",
    "save_safetensors",
    "unpacked",
    "write_bytes_atomic",
    "write_json_atomic",
]
