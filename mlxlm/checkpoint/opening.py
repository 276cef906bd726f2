"""One door to weights on disk, whatever wrote them."""

from __future__ import annotations

import os
from pathlib import Path

from mlxlm.checkpoint.gguf import open_gguf
from mlxlm.checkpoint.safetensors import open_safetensors
from mlxlm.checkpoint.tensors import Checkpoint
from mlxlm.checkpoint.torch_files import INDEX, SUFFIXES, open_torch, torch_files


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a .gguf, .safetensors or PyTorch file, or in a directory of the last two; headers only.

    A directory with the usual files of both holds the same twice: the safetensors are taken.
    Raises ModelNotFoundError and CheckpointError as `open_gguf`, `open_safetensors` and `open_torch` do.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        names = os.listdir(path)
        named = any(name == "model.safetensors" or name.endswith(".safetensors.index.json") for name in names)
        pytorch = not named and {"pytorch_model.bin", INDEX} & set(names)
        others = any(name.endswith(".safetensors") for name in names)
        return open_torch(path) if pytorch or (not others and torch_files(names)) else open_safetensors(path)
    if suffix == ".gguf":
        return open_gguf(path)
    return open_torch(path) if suffix in SUFFIXES else open_safetensors(path)
