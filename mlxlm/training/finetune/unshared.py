"""A model with an adapter as it was before processes shared it: what a whole adapter is put into to be written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx import nn

from mlxlm import peft
from mlxlm.models import Transformer
from mlxlm.peft.places import base_modules
from mlxlm.training.finetune.answers import untouched_chance

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer


def adapter_folder(path: str) -> Path:
    """The folder of an adapter given by itself or by its tensors' file, as mlx-lm has it."""
    found = Path(path).expanduser()
    return found.parent if found.is_file() else found


def unshared(model: Transformer, method: peft.Method, tokenizer: Tokenizer, begun: str | None) -> Transformer:
    """A model of the same configuration and adapter, whole, its values drawn and not yet computed.

    model: a process's part.  method: of the adapter, or begun: the path of the adapter that the run began with.
    """
    with untouched_chance(model), mx.stream(mx.cpu):
        whole = Transformer(model.config)
        whole.source = model.source
        forms = {
            path: {name: getattr(module, name) for name in ("group_size", "bits", "mode")}
            for path, module in base_modules(model)
            if hasattr(module, "bits")
        }
        nn.quantize(whole, class_predicate=lambda path, module: forms.get(path, False))
        if begun is not None:
            return peft.load_adapter(whole, adapter_folder(begun), trainable=True)
        return peft.apply(whole, method, tokenizer=tokenizer)
