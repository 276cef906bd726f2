"""Parameter-efficient fine-tuning: methods, adapters in and out of models and files, merging.

model = apply(model, Lora(rank=8, targets=("query", "value")))    # in place; only the adapter is trainable
save_adapter(model, "folder")                                     # a Hugging Face PEFT folder
load_adapter(model, "folder", name="other")                       # of PEFT, mlx-lm or the adapters library
activate(model, {"default": 0.5, "other": 0.5})
merge(model)
"""

from mlxlm.peft.adapters import Adapter, Counts, activate, apply, content_of, count_parameters, unload
from mlxlm.peft.bottleneck import Houlsby, ParallelAdapter, Pfeiffer
from mlxlm.peft.files import load_adapter, load_with_adapter, save_adapter
from mlxlm.peft.ia3 import Ia3
from mlxlm.peft.lora import Dora, Lora, Qlora
from mlxlm.peft.merging import MergeReport, merge
from mlxlm.peft.method import Method
from mlxlm.peft.methods import METHODS
from mlxlm.peft.prefix import PrefixTuning, PTuningV2
from mlxlm.peft.prompts import PromptTuning, PTuning
from mlxlm.peft.selective import BitFit, Full, LastLayers
from mlxlm.peft.task_heads import with_task_head

__all__ = [
    "METHODS",
    "Adapter",
    "BitFit",
    "Counts",
    "Dora",
    "Full",
    "Houlsby",
    "Ia3",
    "LastLayers",
    "Lora",
    "MergeReport",
    "Method",
    "PTuning",
    "PTuningV2",
    "ParallelAdapter",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "Qlora",
    "activate",
    "apply",
    "content_of",
    "count_parameters",
    "load_adapter",
    "load_with_adapter",
    "merge",
    "save_adapter",
    "unload",
    "with_task_head",
]
