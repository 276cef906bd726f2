"""All methods by name."""

from __future__ import annotations

from mlxlm.peft.bottleneck import Houlsby, ParallelAdapter, Pfeiffer
from mlxlm.peft.ia3 import Ia3
from mlxlm.peft.lora import Dora, Lora, Qlora
from mlxlm.peft.method import Method
from mlxlm.peft.prefix import PrefixTuning, PTuningV2
from mlxlm.peft.prompts import PromptTuning, PTuning
from mlxlm.peft.selective import BitFit, Full, LastLayers

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Full,
        Lora,
        Dora,
        Qlora,
        PromptTuning,
        PrefixTuning,
        PTuning,
        PTuningV2,
        Houlsby,
        Pfeiffer,
        ParallelAdapter,
        Ia3,
        BitFit,
        LastLayers,
    )
}
