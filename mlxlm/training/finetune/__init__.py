"""Fine-tuning: a model, rows and a method in, an adapter folder or a whole model out, measured before and after.

settings = FinetuneSettings(model="path/or/id", data="folder", method="lora", adapter_path="runs/first")
outcome = finetune(settings, [Console(), MetricsFile(settings.folder)])
print(outcome.test["accuracy"])
"""

from mlxlm.training.finetune.presets import MEMORY_PRESETS, METHOD_PRESETS
from mlxlm.training.finetune.run import Outcome, Run, finetune, prepare
from mlxlm.training.finetune.settings import FinetuneSettings

__all__ = ["MEMORY_PRESETS", "METHOD_PRESETS", "FinetuneSettings", "Outcome", "Run", "finetune", "prepare"]
