"""What settings are when nobody says: by method, and by how much memory there is. Data, to be read and argued with."""

from __future__ import annotations

from typing import Any

# By method: the learning rate, which is that of examples/finetune (whose README says what it led to), but lower where
# whole weights of larger models are trained; whether weights that are quantized on disk stay so (None: as the device
# prefers it), since whole weights that are trained can't be.
METHOD_PRESETS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-4, "quantized": False},
    "last-layers": {"learning_rate": 3e-4, "quantized": False},
    "bitfit": {"learning_rate": 2e-3, "quantized": None},
    "lora": {"learning_rate": 5e-4, "quantized": None},
    "dora": {"learning_rate": 5e-4, "quantized": None},
    "qlora": {"learning_rate": 5e-4, "quantized": True},
    "ia3": {"learning_rate": 1e-2, "quantized": None},
    "houlsby": {"learning_rate": 1e-3, "quantized": None},
    "pfeiffer": {"learning_rate": 1e-3, "quantized": None},
    "parallel-adapter": {"learning_rate": 5e-4, "quantized": None},
    "prompt": {"learning_rate": 3e-2, "quantized": None},
    "p-tuning": {"learning_rate": 2e-3, "quantized": None},
    "prefix": {"learning_rate": 3e-3, "quantized": None},
    "p-tuning-v2": {"learning_rate": 1e-2, "quantized": None},
}

# By --memory: what "low" sets whatever the plan says: one row at a time, all layers computed again, no freed buffers
# kept. "auto" and "check" ask the plan.
MEMORY_PRESETS: dict[str, dict[str, Any]] = {
    "check": {},
    "auto": {},
    "off": {},
    "low": {"batch_size": 1, "recompute_layers": -1, "cache_limit": 0},
}
